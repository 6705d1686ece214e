"""A bound is never below what is billed, what fits is told to the token, and media is no text."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from gateway.decide.bound import (
    LONGEST_CONTEXT,
    OVERHEAD_TOKENS,
    PromptBound,
    Weight,
    affordable_max_tokens,
    bound_of,
    completion_bound,
    estimate,
    hides_reasoning,
    is_over,
    most_nusd,
    weigh,
)
from gateway.decide.targets import Target
from gateway.domain.money import MAX_TOKENS, Price, Tier, cost_nusd
from gateway.domain.settings import Timeouts
from gateway.domain.wire import encode, read_chat
from tests.domain.test_money import RATES, prices, usages_within


def target(
    kind: str = "openai", model: str = "gpt-4o", price: Price | None = None, context_tokens: int | None = None
) -> Target:
    return Target(f"x/{model}", "x", model, kind, price, Timeouts(), context_tokens, continues=False)


def fields(content: Any = "hello", **more: Any) -> dict[str, Raw]:
    asked = {"model": "m", "messages": [{"role": "user", "content": content}], **more}
    return read_chat(json.dumps(asked).encode()).fields


def bound(content: Any, of: Target | None = None, **more: Any) -> PromptBound:
    return bound_of(weigh(fields(content, **more)), of or target())


def image(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


DATA_URL = "data:image/png;base64," + base64.b64encode(bytes(30_000)).decode()

# --- Text ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=60), min_size=1, max_size=6), st.booleans())
def test_no_byte_level_vocabulary_makes_more_tokens_of_the_text_than_the_bound(texts: list[str], plain: bool) -> None:
    messages = [{"role": "user", "content": text} for text in texts]
    body = json.dumps({"model": "m", "messages": messages}, ensure_ascii=plain).encode("utf-8", "surrogatepass")
    if any("\ud800" <= char <= "\udfff" for text in texts for char in text):
        return
    tokens = bound_of(weigh(read_chat(body).fields), target()).tokens
    # One token for each byte of the decoded text, and a generous frame for each message.
    assert tokens >= sum(len(text.encode()) for text in texts) + 30 * len(texts)
    assert tokens <= len(body) + OVERHEAD_TOKENS * len(texts)


def test_every_field_counts_and_every_message_and_tool_has_its_overhead() -> None:
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
    plain, with_tools = fields(), fields(tools=[tool, tool])
    assert weigh(plain).text_tokens == sum(len(bytes(raw)) for raw in plain.values()) + OVERHEAD_TOKENS
    more = weigh(with_tools).text_tokens - weigh(plain).text_tokens
    assert more == len(bytes(with_tools["tools"])) + 2 * OVERHEAD_TOKENS
    assert weigh(plain).media is None


@pytest.mark.parametrize("tools", [None, [], {}, "none", 5])
def test_tools_of_any_shape_are_weighed(tools: Any) -> None:
    assert weigh(fields(tools=tools)).text_tokens >= weigh(fields()).text_tokens


@pytest.mark.parametrize("content", [None, "x", [], [{}], [5], 5, {"a": 1}, [{"type": "text", "text": 5}], [[]]])
def test_contents_of_any_shape_are_weighed(content: Any) -> None:
    assert bound(content).tokens > OVERHEAD_TOKENS


def test_parts_of_text_are_text() -> None:
    found = bound([{"type": "text", "text": "a" * 500}, {"type": "refusal", "refusal": "no"}])
    assert (500 < found.tokens < 800, found.images, found.has_audio) == (True, 0, False)


# --- Media -----------------------------------------------------------------------------------------------------------


def test_the_bytes_of_an_image_are_no_text() -> None:
    found = bound([{"type": "text", "text": "what is it?"}, image(DATA_URL)])
    assert found.images == 1
    assert 1_445 < found.tokens < 1_445 + 400 < len(DATA_URL)


def test_a_remote_image_counts_as_the_largest() -> None:
    assert bound([image("https://x.y/z.png")]).tokens > 1_445


@pytest.mark.parametrize("key", ["image_url", "im\\u0061ge_url"])
def test_an_image_cannot_hide_behind_an_escape(key: str) -> None:
    part = '{"type":"image_url","image_url":{"url":"https://x.y"}}'.replace("image_url", key)
    body = '{"model":"m","messages":[{"role":"user","content":[' + part + "]}]}"
    assert bound_of(weigh(read_chat(body.encode()).fields), target()).images == 1


def test_a_data_url_in_a_text_is_text() -> None:
    assert bound([{"type": "text", "text": DATA_URL, "image_url": {"url": DATA_URL}}]).tokens > 2 * len(DATA_URL)


def test_what_the_price_says_of_an_image_goes_before_the_formula() -> None:
    price = Price(input_nusd_per_mtok=1, output_nusd_per_mtok=1, image_tokens=7)
    without = Price(input_nusd_per_mtok=1, output_nusd_per_mtok=1)
    content = [image("https://x.y"), image("https://x.y")]
    assert bound(content, target(price=without)).tokens - bound(content, target(price=price)).tokens == 2 * (1_445 - 7)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "file", "file": {"file_id": "f"}},
        {"type": "file", "file": {"file_data": DATA_URL}},
        {"type": "document_url", "document_url": "https://x.y/z.pdf"},
        {"type": "video_url", "video_url": {"url": "https://x.y"}},
        {"type": "input_audio", "input_audio": "https://x.y/z.mp3"},
        {},
    ],
)
def test_a_part_that_may_be_of_any_size_may_fill_the_context(part: dict[str, Any]) -> None:
    assert bound([part]).tokens == LONGEST_CONTEXT
    assert bound([part], target(context_tokens=32_000)).tokens == 32_000


def test_audio_moves_the_price_only_where_there_is_some() -> None:
    price = Price(input_nusd_per_mtok=1, output_nusd_per_mtok=1, audio_input_nusd_per_mtok=50)
    silent, spoken = bound("hello"), bound("hello", modalities=["text", "audio"], audio={"voice": "x"})
    heard = bound([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}}])
    assert [found.has_audio for found in (silent, spoken, heard)] == [False, True, True]
    assert most_nusd(price, spoken._replace(tokens=10**6), 0) == 50 * most_nusd(price, silent._replace(tokens=10**6), 0)


def test_an_earlier_answer_in_audio_counts_though_only_its_id_is_sent() -> None:
    messages = [{"role": "assistant", "audio": {"id": "a"}}, {"role": "user", "content": "and then?"}]
    found = bound("", messages=messages)
    assert (found.tokens > 16_384, found.has_audio) == (True, True)


def test_a_predicted_answer_may_be_billed_on_top_of_the_limit() -> None:
    found = bound("hello", prediction={"type": "content", "content": "a" * 300})
    assert found.predicted_tokens > 300
    assert completion_bound(found, 10, 2) == 2 * (10 + found.predicted_tokens)


# --- What fits -------------------------------------------------------------------------------------------------------

BOUNDS = st.builds(
    PromptBound, st.integers(0, 10**6), st.integers(0, 5), st.integers(0, 5_000), st.integers(0, 500), st.booleans()
)
LEFT = st.none() | st.integers(0, 10**7)


@given(st.none() | prices(), BOUNDS, st.integers(1, 8), st.none() | st.integers(0, 10**13), LEFT)
def test_what_is_affordable_fits_and_one_more_does_not(
    price: Price | None, prompt: PromptBound, n: int, money_nusd: int | None, tokens_left: int | None
) -> None:
    def fits(max_tokens: int) -> bool:
        completion = completion_bound(prompt, max_tokens, n)
        is_paid = price is None or money_nusd is None or most_nusd(price, prompt, completion) <= money_nusd
        return is_paid and (tokens_left is None or prompt.tokens + completion <= tokens_left)

    found = affordable_max_tokens(price, prompt, n, money_nusd=money_nusd, tokens_left=tokens_left)
    assert 0 <= found <= MAX_TOKENS
    assert found == 0 or fits(found)
    assert found == MAX_TOKENS or not fits(found + 1)


@given(prices(), BOUNDS, st.integers(1, 4), st.integers(1, 5_000), st.data())
def test_no_sound_usage_within_the_bound_costs_more_than_the_hold(
    price: Price, prompt: PromptBound, n: int, max_tokens: int, data: st.DataObject
) -> None:
    completion = completion_bound(prompt, max_tokens, n)
    usage = data.draw(usages_within(prompt.tokens, completion, prompt.audio_seconds, has_audio=prompt.has_audio))
    assert cost_nusd(price, usage, images=prompt.images) <= most_nusd(price, prompt, completion)


def test_a_free_model_is_limited_by_nothing_but_tokens() -> None:
    free = Price(input_nusd_per_mtok=0, output_nusd_per_mtok=0)
    assert affordable_max_tokens(free, PromptBound(10), 1, money_nusd=0, tokens_left=None) == MAX_TOKENS
    assert affordable_max_tokens(free, PromptBound(10), 3, money_nusd=0, tokens_left=100) == 30


@given(RATES, RATES)
def test_a_tier_that_the_prompt_may_reach_counts(base: int, above: int) -> None:
    tier = Tier(above_tokens=100, input_nusd_per_mtok=above, output_nusd_per_mtok=above)
    price = Price(input_nusd_per_mtok=base, output_nusd_per_mtok=base, tiers=(tier,))
    assert most_nusd(price, PromptBound(100), 0) == -(-100 * base // 10**6)
    assert most_nusd(price, PromptBound(101), 0) == -(-101 * max(base, above) // 10**6)


# --- Where nobody says what was used ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "content_bytes", "ran_over", "tokens"),
    [(0, 0, False, 0), (10, 3, False, 10), (1, 31, False, 11), (90, 900, False, 100), (90, 900, True, 300)],
)
def test_an_estimate_counts_upwards_and_no_further_than_the_limit(
    events: int, content_bytes: int, ran_over: bool, tokens: int
) -> None:
    prompt = PromptBound(50, audio_seconds=3)
    found = estimate(prompt, events=events, content_bytes=content_bytes, most_tokens=100, ran_over=ran_over)
    assert (found.prompt_tokens, found.completion_tokens, found.audio_seconds) == (50, tokens, 3)


@pytest.mark.parametrize(
    ("kind", "model", "hides"),
    [("openai", "o3", True), ("openai", "gpt-5-mini", True), ("openai", "gpt-4o", False), ("mistral", "m", False),
     ("openai", "ft:gpt-4o-mini:org::id", False), ("openai", "gpt-9", True), ("compatible", "r1", False)],
)  # fmt: skip
def test_which_models_think_unseen(kind: str, model: str, hides: bool) -> None:
    assert hides_reasoning(target(kind, model)) is hides


@pytest.mark.parametrize(
    ("events", "content_bytes", "limit", "over"),
    [
        (116, 500, 100, False),
        (117, 500, 100, True),
        # A stream smoothed into letters, of 600 bytes, is 100 to 200 tokens long: not certain.
        (600, 600, 100, False),
        (701, 701, 100, False),
        (702, 702, 100, True),
        # As many Chinese letters, three bytes each, are fewer tokens than letters.
        (150, 450, 100, False),
        (0, 0, 1, False),
    ],
)
def test_a_stream_is_cut_only_where_it_is_certain_to_be_over(
    events: int, content_bytes: int, limit: int, over: bool
) -> None:
    assert is_over(events=events, content_bytes=content_bytes, limit_tokens=limit) is over


def test_a_weight_is_the_same_after_the_fields_went_through_json() -> None:
    first = fields([{"type": "text", "text": "é"}, image(DATA_URL)])
    assert weigh(read_chat(encode(first)).fields) == weigh(first)
    assert isinstance(weigh(first), Weight)
