"""Ask three questions about one text, two at once and then a third, on any server with OpenAI's protocol.

Example:

    python docs/vllm_client.py http://localhost:8000/v1 article.txt
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from openai import AsyncOpenAI


async def ask(client: AsyncOpenAI, model: str, name: str, text: str, question: str) -> None:
    """Stream an answer, and print it with the token counts that the server reports."""
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"{text}\n\n{question}"}],
        max_tokens=48,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces = []
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            pieces.append(chunk.choices[0].delta.content)
        if chunk.usage:
            details = chunk.usage.prompt_tokens_details
            shared = details.cached_tokens if details else 0
            print(f"{name}: {''.join(pieces)!r}")
            print(f"{name}: {len(pieces)} pieces, {chunk.usage.prompt_tokens} tokens read, {shared} of them shared")


async def main(url: str, path: str) -> None:
    """Ask two questions at once and a third when both are answered."""
    client = AsyncOpenAI(base_url=url, api_key="none")
    model = (await client.models.list()).data[0].id
    text = Path(path).read_text(encoding="utf-8")
    await asyncio.gather(
        ask(client, model, "first", text, "What is this text about?"),
        ask(client, model, "second", text, "Name an animal in this text."),
    )
    await ask(client, model, "third", text, "Which countries does this text name?")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
