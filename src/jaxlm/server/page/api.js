// Requests to the server. Their URLs are relative, so that the page works behind the path of a proxy.

export class ApiError extends Error {
  // status: 0 if there was no answer. retryAfter: seconds.
  constructor(message, status = 0, retryAfter = 1) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

// The names of the models.
export async function listModels(key) {
  const response = await request("v1/models", key, {});
  return (await response.json()).data.map((model) => model.id);
}

// The chunks of an answer, as they come.
export async function* streamChat(body, key, signal) {
  const response = await request("v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const line of linesOf(response)) {
    if (!line.startsWith("data:")) continue; // the blank line after an event
    const data = line.slice(5).trim();
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, response.status);
    yield chunk;
  }
  throw lostConnection();
}

async function request(path, key, options) {
  const headers = key ? { ...options.headers, Authorization: `Bearer ${key}` } : options.headers;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Check that jaxlm serve is running, then retry.");
  }
  if (response.ok) return response;
  throw new ApiError(await messageOf(response), response.status, Number(response.headers.get("Retry-After")) || 1);
}

// The message of an error. An answer that is not JSON is that of a proxy.
async function messageOf(response) {
  const isJson = response.headers.get("Content-Type")?.startsWith("application/json");
  const message = isJson ? (await response.json()).error?.message : null;
  return message ?? `The server answered with status ${response.status}.`;
}

async function* linesOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw lostConnection();
    }
    if (part.done) return;
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    yield* lines;
  }
}

function lostConnection() {
  return new ApiError("The connection to the server was lost: the answer is not complete.");
}
