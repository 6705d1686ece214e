// Asks a running gateway in every way its test wants to see, and prints what came of it as one JSON object.
// OPENAI_MODULE is the package's address, as a module is found beside its script and not where it is installed.

const { default: OpenAI } = await import(process.env.OPENAI_MODULE);
const baseURL = process.env.GATEWAY_URL;
const client = new OpenAI({ baseURL, apiKey: process.env.GATEWAY_KEY, maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const tools = [
  {
    type: "function",
    function: {
      name: "get_weather",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];
const chat = client.chat.completions;

const failed = async (work) => {
  try {
    await work();
    return null;
  } catch (error) {
    const { name } = error.constructor;
    return { name, status: error.status, code: error.code, message: error.message, requestId: error.requestID };
  }
};

const read = async (stream) => {
  const seen = { text: "", chunks: 0, finishReasons: [], usage: null };
  const error = await failed(async () => {
    for await (const chunk of stream) {
      seen.chunks += 1;
      seen.text += chunk.choices[0]?.delta?.content ?? "";
      if (chunk.choices[0]?.finish_reason) seen.finishReasons.push(chunk.choices[0].finish_reason);
      if (chunk.usage) seen.usage = chunk.usage;
    }
  });
  return { ...seen, error };
};

const plain = await chat.create({ model: "qa_agent", messages });
const { response } = await chat.create({ model: "auto", messages }).withResponse();
const stream = await chat.create({
  model: "qa_agent",
  messages,
  stream: true,
  stream_options: { include_usage: true },
});
const called = await chat.create({ model: "qa_agent", messages, tools, tool_choice: "required" });
const helper = chat.stream({ model: "qa_agent", messages });
const helped = await helper.finalContent();

const models = [];
for await (const model of client.models.list()) models.push(model.id);

const leaving = new AbortController();
const left = { chunks: 0, finished: false };
const endless = await chat.create({ model: "sim/fault:stall", messages, stream: true }, { signal: leaving.signal });
const leftError = await failed(async () => {
  for await (const chunk of endless) {
    left.chunks += 1;
    left.finished ||= Boolean(chunk.choices[0]?.finish_reason);
    leaving.abort();
  }
});

const stranger = new OpenAI({ baseURL, apiKey: "wrong" });
const found = {
  plain: { ...plain, requestId: plain._request_id },
  headers: Object.fromEntries(response.headers),
  stream: await read(stream),
  toolCalls: called.choices[0].message.tool_calls,
  helped,
  models,
  left: { ...left, error: leftError },
  joined: await read(
    await chat.create(
      { model: "joined_agent", messages, stream: true },
      { headers: { "x-gateway-variant": "finetuned" } },
    ),
  ),
  differs: await read(
    await chat.create(
      { model: "after_cut", messages, stream: true },
      { headers: { "x-gateway-variant": "finetuned" } },
    ),
  ),
  malformed: await read(await chat.create({ model: "sim/fault:malformed", messages, stream: true })),
  stalled: await read(await chat.create({ model: "hasty/fault:stall", messages, stream: true })),
  cut: await read(await chat.create({ model: "sim/fault:cut", messages, stream: true })),
  errors: {
    unknown: await failed(() => chat.create({ model: "qa_agnet", messages })),
    wrongKey: await failed(() => stranger.chat.completions.create({ model: "qa_agent", messages })),
    badRequest: await failed(() => chat.create({ model: "qa_agent", messages, n: 1000 })),
    limited: await failed(() => chat.create({ model: "sim/fault:429-bare", messages })),
    broken: await failed(() => chat.create({ model: "sim/fault:500", messages })),
    late: await failed(() =>
      chat.create(
        { model: "sim/fault:silent", messages },
        { timeout: 200, headers: { "x-stainless-timeout": null } },
      ),
    ),
  },
};
console.log(JSON.stringify(found));
