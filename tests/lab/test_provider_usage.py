"""A provider's figures are read from each of the shapes it gives them in, and asked of it where it can be asked."""

from collections.abc import Awaitable, Callable
from io import BytesIO

import aiohttp
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway.domain.secret import Secret
from gateway.lab.ledger_csv import CsvProblems
from gateway.lab.provider_usage import UsageDay, UsageUnavailable, fetch_mistral_usage, merged, read_usage

PLAIN = "day,model,prompt_tokens,completion_tokens,usd,requests\n"
OPENAI = (
    "start_time,end_time,start_time_iso,end_time_iso,project_id,num_model_requests,model,service_tier,input_tokens,"
    "output_tokens,input_cached_tokens\n"
)
MISTRAL = {
    "completion": {
        "models": {
            "mistral-small-latest::mistral-small-2506": {
                "input": [{"billing_metric": "mistral-small-2506", "billing_group": "input", "timestamp": "2026-11-02",
                           "event_type": "api_tokens", "value": 1_000, "value_paid": 800}],
                "cached": [{"billing_metric": "mistral-small-2506", "billing_group": "cached",
                            "timestamp": "2026-11-02T00:00:00Z", "value": 200, "value_paid": 200}],
                "output": [{"billing_metric": "mistral-small-2506", "billing_group": "output",
                            "timestamp": "2026-11-02", "value": 50}],
            },
            "open-mistral-7b": {"output": [{"timestamp": "2026-11-03", "value": 7}]},
        }
    },
    "ocr": {"models": {}},
    "vibe_usage": 0,
    "currency": "USD",
    "start_date": "2026-11-01T00:00:00Z",
    "end_date": "2026-11-30T23:59:59Z",
    "prices": [
        {"billing_metric": "mistral-small-2506", "billing_group": "input", "event_type": "api_tokens",
         "api_zone": "global", "service_tier": "standard", "price": "0.0000001"},
        {"billing_metric": "mistral-small-2506", "billing_group": "input", "event_type": "api_audio_seconds",
         "api_zone": "global", "service_tier": "standard", "price": "0.5"},
        {"billing_metric": "mistral-small-2506", "billing_group": "cached", "event_type": None,
         "api_zone": "global", "service_tier": "standard", "price": 0.00000001},
        {"billing_metric": "mistral-small-2506", "billing_group": "output", "event_type": "api_tokens",
         "api_zone": "global", "service_tier": "standard", "price": "0.0000003"},
    ],
}  # fmt: skip
MISTRAL_DAYS = [
    UsageDay("2026-11-01", ""),
    UsageDay("2026-11-02", "mistral-small-2506", 1_200, 50, 97_000, None, ("mistral-small-latest",)),
    UsageDay("2026-11-03", "open-mistral-7b", 0, 7, None, None),
    UsageDay("2026-11-30", ""),
]


def read(content: str | bytes) -> list[UsageDay]:
    return read_usage(BytesIO(content.encode() if isinstance(content, str) else content), "usage.csv")


def problems_of(content: str | bytes) -> list[str]:
    with pytest.raises(CsvProblems) as caught:
        read(content)
    return [f"{problem.file} {problem.key} {problem.found}: {problem.fix}" for problem in caught.value.problems]


def test_the_plain_file_is_one_line_per_day_and_model() -> None:
    content = f"{PLAIN}2026-11-22,m,5,6,,\n2026-11-21,m,10,20,0.30,2\n2026-11-21,m,1,2,0.01,1\n"
    assert read(content) == [
        UsageDay("2026-11-21", "m", 11, 22, 310_000_000, 3),
        UsageDay("2026-11-22", "m", 5, 6, None, None),
    ]
    assert read("model,day,completion_tokens,prompt_tokens\nm,2026-11-21,6,5\n") == [UsageDay("2026-11-21", "m", 5, 6)]


def test_a_sum_of_which_a_part_is_not_told_is_not_told() -> None:
    assert merged(UsageDay("d", "m", 1, 1, 5, 1), UsageDay("d", "m", 1, 1, None, 1)) == UsageDay(
        "d", "m", 2, 2, None, 2
    )


def test_openai_s_export_is_read_with_its_empty_days_and_its_decimal_points() -> None:
    content = OPENAI + (
        "1759622400,1759708800,2025-10-05T00:00:00+00:00,2025-10-06T00:00:00+00:00,proj_a,10.0,gpt-4o-2024-08-06,"
        "default,59200.0,10646.0,5760.0\n"
        "1759622400,1759708800,2025-10-05T00:00:00+00:00,2025-10-06T00:00:00+00:00,proj_b,1,gpt-4o-2024-08-06,"
        "default,800,4,0\n"
        "1759708800,1759795200,2025-10-06T00:00:00+00:00,2025-10-07T00:00:00+00:00,,,,,,,\n"
    )
    assert read(content) == [
        UsageDay("2025-10-05", "gpt-4o-2024-08-06", 60_000, 10_650, None, 11),
        UsageDay("2025-10-06", ""),
    ]


def test_openai_s_buckets_of_an_hour_are_added_up_to_days_in_utc() -> None:
    lines = [f"1,2,2025-10-05T{hour}:00:00+00:00,,p,1,gpt-4o,default,10,1,0\n" for hour in ("00", "23")]
    late = "1,2,2025-10-05T23:00:00-05:00,,p,1,gpt-4o,default,5,5,0\n"
    assert read(OPENAI + "".join(lines) + late) == [
        UsageDay("2025-10-05", "gpt-4o", 20, 2, None, 2),
        UsageDay("2025-10-06", "gpt-4o", 5, 5, None, 1),
    ]


def test_mistral_s_answer_is_read_with_both_names_of_a_model_and_the_price_that_fits() -> None:
    assert read(msgspec.json.encode(MISTRAL)) == MISTRAL_DAYS


def test_what_mistral_bills_in_euros_is_no_dollars() -> None:
    assert {day.nusd for day in read(msgspec.json.encode(MISTRAL | {"currency": "EUR"}))} == {None}


def test_where_two_prices_fit_none_is_taken() -> None:
    prices = [price | {"price": "1", "api_zone": "eu"} for price in MISTRAL["prices"]]  # type: ignore[operator]
    days = read(msgspec.json.encode(MISTRAL | {"prices": [*MISTRAL["prices"], *prices]}))  # type: ignore[misc]
    assert {day.nusd for day in days} == {None}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "the file is empty"),
        ("day,modle,prompt_tokens,completion_tokens\n", 'modle : no such column; did you mean "model"?'),
        ("day,model,prompt_tokens\n", "completion_tokens : this column is missing"),
        (f"{PLAIN}21/11/2026,m,1,1,,\n", 'usage.csv:2 day "21/11/2026": wants a day such as 2026-11-21'),
        (f"{PLAIN}2026-11-21,,1,1,,\n", "usage.csv:2 model"),
        (f"{PLAIN}2026-11-21,m,,1,,\n", "usage.csv:2 prompt_tokens"),
        (f"{PLAIN}2026-11-21,m,1,-1,,\n", "usage.csv:2 completion_tokens"),
        (f"{PLAIN}2026-11-21,m,1,1.5,,\n", "usage.csv:2 completion_tokens"),
        (f'{PLAIN}2026-11-21,m,1,1,"0,5",\n', 'usage.csv:2 usd "0,5"'),
        (f"{PLAIN}2026-11-21,m,1,1,,x\n", "usage.csv:2 requests"),
        ("start_time_iso,input_tokens,output_tokens\n", "model : this column is missing"),
        (f"{OPENAI}1,2,2025-10-05T00:00:00+00:00,,p,1,,default,5,5,0\n", "group the export by model"),
        ("start_time,amount_value,amount_currency\n", "export of costs, which names no model"),
        ('{"object": "list"}', "wants the JSON of GET /v1/admin/usage"),
        ('{"completion": {"models": {"m": {"input": [{"timestamp": "soon", "value": 1}]}}}}', "usage.csv:1 json"),
        ('{"completion": {"models": {"m": {"input": [{"timestamp": "2026-11-01", "value": -1}]}}}}', "value of -1"),
        ('{"completion": {"models": {"m": {"input": [{"value": 1}]}}}}', "timestamp"),
        (b"{\xff", "usage.csv:1 json"),
    ],
)
def test_a_file_that_is_wrong_says_where_and_why(content: str | bytes, said: str) -> None:
    assert said in "\n".join(problems_of(content))


async def fetched(answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> list[UsageDay]:
    app = web.Application()
    app.router.add_get("/v1/admin/usage", answer)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        url = str(server.make_url("")).rstrip("/")
        return await fetch_mistral_usage(session, Secret("admin-key"), year=2026, month=11, url=url)


async def test_mistral_is_asked_for_a_month_with_the_key_in_both_ways_it_documents() -> None:
    asked: list[tuple[str, str | None, str | None]] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append((request.query_string, request.headers.get("x-api-key"), request.headers.get("Authorization")))
        return web.json_response(body=msgspec.json.encode(MISTRAL))

    assert await fetched(answer) == MISTRAL_DAYS
    assert asked == [("year=2026&month=11", "admin-key", "Bearer admin-key")]


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, "no", r"refused the key \(401\): it wants an Admin API key.*reconcile with that file"),
        (404, "no", r"refused the key \(404\)"),
        (302, "", "answered 302"),
        (500, "oops", "answered 500; try later"),
        (200, "<html>", "wants the JSON"),
    ],
)
async def test_a_provider_that_does_not_say_is_an_error_that_names_the_way_out(
    status: int, body: str, said: str
) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status, text=body, headers={"Location": "/"} if status == 302 else None)

    with pytest.raises(UsageUnavailable, match=said) as caught:
        await fetched(answer)
    assert "admin-key" not in str(caught.value)


async def test_a_provider_that_is_not_there_is_an_error_too(unused_tcp_port: int) -> None:
    async with aiohttp.ClientSession() as session:
        with pytest.raises(UsageUnavailable, match="cannot be reached"):
            await fetch_mistral_usage(
                session, Secret("k"), year=2026, month=11, url=f"http://127.0.0.1:{unused_tcp_port}"
            )
