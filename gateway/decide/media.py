"""How many tokens images and audio can count as, by their providers' formulas. Upper bounds, not estimates.

Images, OpenAI (guide "Images and vision", and measurements in openai-python#2851, openai/codex#19806 and
llxprt-code#3477, read 2026-11): the older models cover an image of at most 2048 x 768 pixels with tiles of 512,
8 at most, at 170 tokens and 85 for the whole, gpt-4o-mini at 5667 and 2833. The others count patches of 32 pixels,
times up to 2.46: at most 1,536 of them; from gpt-5.4 on 2,500, or 10,000 at `original` detail, times 1.2; from
gpt-5.6 on up to 30,000 where no detail is asked for. Mistral (mistral-common, ImageConfig): patches of 16 pixels up to
1024 with a break after each row, 64 x 65; later models take patches of 28 up to 1540, which is less. Others: Qwen-VL's
default maximum of 16,384 is the highest we know. `image_tokens` of a price says it better.

Audio: OpenAI counts 10 tokens a second of what is heard and 20 of what is spoken, Mistral 12.5, and others up to 50.
A PCM file says how long it is; any other is taken to be at 6 kbit/s, the lowest at which speech is encoded.
"""

import binascii
from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import msgspec
from msgspec import Raw

_TILED = ("gpt-4o", "gpt-4.1", "gpt-4.5", "gpt-4-turbo", "gpt-4-vision", "chatgpt-4o", "o1", "o3", "computer-use")
_MINI_TILES = 2833 + 8 * 5667
_TILES = 85 + 8 * 170
_PATCHES = ceil(1_536 * 2.46)
# By the beginning of the model's name, first match: tokens of one image at most, and of one at low detail.
_OPENAI_IMAGES = (
    ("gpt-4o-mini", _MINI_TILES, 2833),
    ("gpt-4.1-mini", _PATCHES, _PATCHES),
    ("gpt-4.1-nano", _PATCHES, _PATCHES),
    *((name, _TILES, 85) for name in _TILED),
    ("gpt-5.4", 12_000, _PATCHES),
    ("gpt-5.5", 12_000, _PATCHES),
    ("o4-mini", _PATCHES, _PATCHES),
    *((name, _PATCHES, _PATCHES) for name in ("gpt-5-", "gpt-5.1", "gpt-5.2", "gpt-5.3")),
    ("", 36_000, _PATCHES),
)
_MISTRAL_IMAGE = 64 * 65
_OTHER_IMAGE = 16_384
_AUDIO_TOKENS_PER_S = {"openai": 20, "mistral": 13}
_OTHER_AUDIO_TOKENS_PER_S = 50
_LOWEST_BYTES_PER_S = 750
# An answer that was spoken before and is referred to by its id is no longer than a model can speak at once.
_SPOKEN_TOKENS = 16_384
_TEXT_TYPES = frozenset({"text", "refusal", "thinking", "reference"})


class Media(NamedTuple):
    """What a request holds beside text. `images` are their details; `payload_bytes` is to be taken out of its bytes.

    `spoken`: earlier answers in audio, by their ids. `is_open`: there are parts of a size that only the provider knows.
    """

    images: tuple[str, ...]
    audio_seconds: int
    spoken: int
    payload_bytes: int
    is_open: bool

    @property
    def has_audio(self) -> bool:
        """Whether any of the prompt's tokens can be audio."""
        return self.audio_seconds > 0 or self.spoken > 0 or self.is_open


class _Image(msgspec.Struct):
    url: str = ""
    detail: str | None = None


class _Audio(msgspec.Struct):
    data: str = ""


class _Part(msgspec.Struct):
    type: str = ""
    image_url: str | _Image | None = None
    input_audio: str | _Audio | None = None


_parts = msgspec.json.Decoder(list[_Part])


def media_of(contents: Sequence[Raw], spoken: int) -> Media:
    """Read the parts of a request's messages. `spoken`: how many messages refer to an earlier answer in audio."""
    images: list[str] = []
    seconds = payload = 0
    is_open = False
    for content in contents:
        try:
            parts = _parts.decode(content)
        except (msgspec.DecodeError, RecursionError):
            # No shape we know: it may be anything.
            is_open = True
            continue
        for part in parts:
            if part.image_url is not None and part.type in ("image_url", ""):
                image = _Image(part.image_url) if isinstance(part.image_url, str) else part.image_url
                images.append(image.detail or "auto")
                payload += len(image.url) if image.url.startswith("data:") else 0
            elif part.input_audio is not None and part.type in ("input_audio", ""):
                data = part.input_audio if isinstance(part.input_audio, str) else part.input_audio.data
                if data.startswith(("http:", "https:")):
                    is_open = True
                else:
                    seconds += audio_seconds(data)
                    payload += len(data)
            elif part.type not in _TEXT_TYPES:
                is_open = True
    return Media(tuple(images), seconds, spoken, payload, is_open)


def image_tokens(media: Media, kind: str, model: str, known: int | None) -> int:
    """The most that the images can count as. `known`: what the configuration says of one image."""
    if known is not None:
        return known * len(media.images)
    if kind != "openai":
        return (_MISTRAL_IMAGE if kind == "mistral" else _OTHER_IMAGE) * len(media.images)
    # A fine-tuned model is named after its base: ft:gpt-4o-2024-08-06:org::id.
    name = model.removeprefix("ft:")
    most, low = next((most, low) for prefix, most, low in _OPENAI_IMAGES if name.startswith(prefix))
    return sum([low if detail == "low" else most for detail in media.images])


def audio_tokens(media: Media, kind: str) -> int:
    """The most that the audio can count as."""
    rate = _AUDIO_TOKENS_PER_S.get(kind, _OTHER_AUDIO_TOKENS_PER_S)
    return media.audio_seconds * rate + media.spoken * _SPOKEN_TOKENS


def audio_seconds(data: str) -> int:
    """The most seconds that base64 audio can last, rounded up."""
    encoded = data.partition(",")[2] if data.startswith("data:") else data
    size = len(encoded) * 3 // 4
    try:
        head = binascii.a2b_base64(encoded[:60])
    except ValueError:
        head = b""
    return -(-size // (_pcm_bytes_per_s(head) or _LOWEST_BYTES_PER_S))


def _pcm_bytes_per_s(head: bytes) -> int:
    """Bytes per second of a WAV file with plain samples; 0 for any other. Of the header only what decoders go by."""
    if len(head) < 36 or head[:4] != b"RIFF" or head[8:16] != b"WAVEfmt " or head[20:22] not in (b"\1\0", b"\3\0"):
        return 0
    channels, rate, bits = (int.from_bytes(head[at:end], "little") for at, end in ((22, 24), (24, 28), (34, 36)))
    return channels * rate * (bits // 8)
