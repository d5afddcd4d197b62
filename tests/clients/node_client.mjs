// The official Node client against an endpoint: `node node_client.mjs URL MODEL`, run where `openai` is installed.
// Says in one JSON object what it was given.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [url, model, folder] = process.argv.slice(2);
const { default: OpenAI } = await import(pathToFileURL(createRequire(`${folder}/package.json`).resolve("openai")));
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const said = {};

said.models = [];
for await (const one of client.models.list()) said.models.push(one.id);
said.model = (await client.models.retrieve(model)).id;

const asked = { model, prompt: "The", max_tokens: 8, temperature: 0, logprobs: 2 };
const whole = await client.completions.create(asked);
said.completion = { text: whole.choices[0].text, tokens: whole.choices[0].logprobs.tokens, usage: whole.usage };
said.streamed = "";
for await (const chunk of await client.completions.create({ ...asked, stream: true }))
  said.streamed += chunk.choices[0]?.text ?? "";

const chat = { model, messages: [{ role: "user", content: "Return a list" }], max_completion_tokens: 8, temperature: 0 };
said.chat = (await client.chat.completions.create(chat)).choices[0].message.content;
said.chat_streamed = "";
const stream = await client.chat.completions.create({ ...chat, stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) {
  said.chat_streamed += chunk.choices[0]?.delta?.content ?? "";
  if (chunk.usage) said.stream_usage = chunk.usage;
}
const gathered = client.chat.completions.stream({ ...chat });
said.gathered = (await gathered.finalChatCompletion()).choices[0].message.content;

said.response = (await client.responses.create({ model, input: "Return a list", max_output_tokens: 16, temperature: 0 })).output_text;
said.embedding = (await client.embeddings.create({ model, input: ["The", "A list"] })).data.map((one) => one.embedding.length);

try {
  await client.chat.completions.create({ ...chat, model: "nobody" });
} catch (error) {
  said.error = { type: error.constructor.name, status: error.status, code: error.code, param: error.param };
}
const leaving = await client.completions.create({ ...asked, max_tokens: 60, stream: true });
for await (const chunk of leaving) break; // leaves in mid-answer
console.log(JSON.stringify(said));
