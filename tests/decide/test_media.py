"""Images and audio count as their providers count them, at most."""

import base64
import struct

import pytest
from msgspec import Raw

from gateway.decide.media import Media, audio_seconds, audio_tokens, image_tokens, media_of


def wav(seconds: int, *, rate: int = 16_000, channels: int = 1, bits: int = 16, kind: int = 1) -> str:
    block = channels * bits // 8
    data = bytes(seconds * rate * block)
    head = struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", 36 + len(data), b"WAVEfmt ", 16, kind, channels, rate,
                       rate * block, block, bits, b"data", len(data))  # fmt: skip
    return base64.b64encode(head + data).decode()


def images(*details: str) -> Media:
    return Media(details, 0, 0, 0, is_open=False)


@pytest.mark.parametrize(
    ("kind", "model", "detail", "tokens"),
    [
        ("openai", "gpt-4o", "high", 1_445),
        ("openai", "gpt-4o-2024-08-06", "low", 85),
        ("openai", "ft:gpt-4o-2024-08-06:org::id", "low", 85),
        ("openai", "gpt-4o-mini", "auto", 48_169),
        ("openai", "gpt-4o-mini-2024-07-18", "low", 2_833),
        ("openai", "gpt-4.1-mini", "high", 3_779),
        ("openai", "gpt-4.1", "high", 1_445),
        ("openai", "o4-mini", "high", 3_779),
        ("openai", "o3", "high", 1_445),
        ("openai", "gpt-5-mini", "auto", 3_779),
        ("openai", "gpt-5.4", "original", 12_000),
        ("openai", "gpt-6-sol", "auto", 36_000),
        ("mistral", "pixtral-12b", "auto", 4_160),
        ("compatible", "qwen", "auto", 16_384),
        ("simulator", "x", "auto", 16_384),
    ],
)
def test_an_image_by_model_and_detail(kind: str, model: str, detail: str, tokens: int) -> None:
    assert image_tokens(images(detail, detail), kind, model, None) == 2 * tokens


def test_an_unknown_model_s_image_is_no_smaller_than_any_patched_one_s() -> None:
    unknown = image_tokens(images("auto"), "openai", "gpt-99", None)
    assert unknown >= max(image_tokens(images("auto"), "openai", f"gpt-5.{minor}", None) for minor in range(10))


@pytest.mark.parametrize(
    ("data", "seconds"),
    [
        (wav(60), 61),
        (wav(10, rate=44_100, channels=2), 11),
        # A header that is not of plain samples, one that lies about having any, and none at all: the lowest bit rate.
        (wav(3, kind=49), 3 * 32_000 // 750 + 1),
        (wav(0, bits=0), 1),
        (base64.b64encode(bytes(7_500)).decode(), 10),
        ("data:audio/mp3;base64," + base64.b64encode(bytes(7_500)).decode(), 10),
        ("", 0),
        ("é" * 1_000, 1),
        ("A", 0),
    ],
    ids=range(9),
)
def test_audio_lasts_no_longer_than_its_bytes_allow(data: str, seconds: int) -> None:
    assert abs(audio_seconds(data) - seconds) <= 1


def test_audio_by_provider() -> None:
    heard, spoken = Media((), 100, 0, 0, is_open=False), Media((), 0, 2, 0, is_open=False)
    assert [audio_tokens(heard, kind) for kind in ("openai", "mistral", "compatible")] == [2_000, 1_300, 5_000]
    assert audio_tokens(spoken, "openai") == 2 * 16_384
    assert (heard.has_audio, spoken.has_audio, images("low").has_audio) == (True, True, False)


def test_both_ways_to_write_a_part_are_read() -> None:
    openai = Raw(
        b'[{"type":"image_url","image_url":{"url":"data:x,AAAA","detail":"low"}},'
        b'{"type":"input_audio","input_audio":{"data":"AAAA","format":"wav"}}]'
    )
    mistral = Raw(b'[{"type":"image_url","image_url":"data:x,AAAA"},{"type":"input_audio","input_audio":"AAAA"}]')
    first, second = media_of([openai], 0), media_of([mistral], 0)
    assert (first.images, second.images) == (("low",), ("auto",))
    assert (first.audio_seconds, first.payload_bytes) == (second.audio_seconds, second.payload_bytes) == (1, 15)
    assert not first.is_open


@pytest.mark.parametrize("content", [b"5", b"[5]", b"{}", b'[{"type":7}]', b"[" * 100_000, b'[{"image_url":5}]'])
def test_a_shape_we_do_not_know_may_be_anything(content: bytes) -> None:
    assert media_of([Raw(content)], 0).is_open
