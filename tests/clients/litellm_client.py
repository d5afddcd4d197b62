"""LiteLLM against an endpoint: `python litellm_client.py URL MODEL`; says in one JSON object what it was given."""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm

url, model = sys.argv[1:]
litellm.suppress_debug_info = True
common: dict[str, Any] = {"api_base": url, "api_key": "none", "temperature": 0, "max_retries": 0}
messages = [{"role": "user", "content": "Return a list"}]
said: dict[str, Any] = {}

whole = litellm.completion(model=f"openai/{model}", messages=messages, max_tokens=8, **common)
said["chat"], said["usage"] = whole.choices[0].message.content, dict(whole.usage)
parts = litellm.completion(model=f"openai/{model}", messages=messages, max_tokens=8, stream=True, **common)
said["chat_streamed"] = "".join(part.choices[0].delta.content or "" for part in parts)
text = litellm.text_completion(model=f"text-completion-openai/{model}", prompt="The", max_tokens=8, **common)
said["completion"] = text.choices[0].text
vectors = litellm.embedding(model=f"openai/{model}", input=["The"], api_base=url, api_key="none")
said["embedding"] = len(vectors.data[0]["embedding"])
try:
    litellm.completion(model="openai/nobody", messages=messages, **common)
except litellm.NotFoundError as error:
    said["error"] = {"status": error.status_code}
sys.stdout.write(json.dumps(said, default=str) + "\n")
