"""Answers from your own documents: embed, search, rerank, ask. Start a server with `python launch.py`, then

python examples/rag.py [--base-url URL] [--embed-url URL] [--rerank-url URL] [--documents FILE] [QUESTION]

One engine serves one model. For real use, start three and name them: Qwen3-Embedding, Qwen3-Reranker and a Qwen3 that
answers. The model inside the package was never taught to embed, and cannot rerank: there, the words of the question
find the document. Needs pip install openai.
"""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from openai import OpenAI

DOCUMENTS = [
    "The lists of the kitchen. cup: 4, plate: 12, spoon: 9.",
    "The lists of the garden. rose: 3, tree: 7, bench: 2.",
    "The lists of the harbour. boat: 15, net: 8, anchor: 6.",
]
INSTRUCTION = "Given a question, retrieve the document that answers it"


def embed(client: OpenAI, model: str, texts: Sequence[str], instruction: str | None = None) -> list[list[float]]:
    """A vector of length 1 for each text. Qwen3-Embedding wants an instruction with queries, none with documents."""
    extra = {"instruction": instruction} if instruction else {}
    answer = client.embeddings.create(model=model, input=list(texts), extra_body=extra, encoding_format="float")
    return [entry.embedding for entry in answer.data]


def by_vector(query: Sequence[float], vectors: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the texts, the nearest first. Beyond some 100,000 texts, take a vector index."""
    return [int(index) for index in np.argsort(-(np.asarray(vectors) @ np.asarray(query)), kind="stable")]


def by_words(question: str, texts: Sequence[str]) -> list[int]:
    """Indices of the texts with words of the question, the best first: rare words count more (BM25 without lengths)."""
    words = [set(re.findall(r"\w+", text.lower())) for text in texts]
    wanted = set(re.findall(r"\w+", question.lower()))
    weight = {word: math.log(1 + len(texts) / n) for word in wanted if (n := sum(word in held for held in words))}
    scores = [sum(weight[word] for word in wanted & held) for held in words]
    return sorted((i for i, score in enumerate(scores) if score > 0), key=lambda i: -scores[i])


def fuse(*rankings: Sequence[int]) -> list[int]:
    """Reciprocal rank fusion (Cormack, Clarke, Buettcher 2009): names and numbers by words, meaning by vectors."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, index in enumerate(ranking, 1):
            scores[index] = scores.get(index, 0.0) + 1 / (60 + rank)
    return sorted(scores, key=lambda index: -scores[index])


def rerank(client: OpenAI, model: str, query: str, texts: Sequence[str]) -> list[tuple[int, float]]:
    """(index, relevance), the most relevant first: the model reads query and document together."""
    body = {"model": model, "query": query, "documents": list(texts)}
    answer = client.post("/rerank", body=body, cast_to=dict[str, list[dict[str, float]]])
    return [(int(entry["index"]), entry["relevance_score"]) for entry in answer["results"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="What is boat?")
    parser.add_argument("--base-url", default="http://127.0.0.1:30000/v1", help="of the model that answers")
    parser.add_argument("--embed-url", help="of the embedding model; default: --base-url")
    parser.add_argument("--rerank-url", help="of the reranker; default: none")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--documents", type=Path, help="a text a line; default: three little ones")
    parser.add_argument("--candidates", type=int, default=20, help="how many documents the reranker reads")
    args = parser.parse_args()
    texts = args.documents.read_text().splitlines() if args.documents else DOCUMENTS

    urls = {"chat": args.base_url, "embed": args.embed_url or args.base_url}
    if args.rerank_url:
        urls["rerank"] = args.rerank_url
    clients = {name: OpenAI(base_url=url, api_key=args.api_key) for name, url in urls.items()}
    models = {name: client.models.list().data[0].id for name, client in clients.items()}

    vectors = embed(clients["embed"], models["embed"], texts)  # once; keep them
    (query,) = embed(clients["embed"], models["embed"], [args.question], INSTRUCTION)
    order = fuse(by_words(args.question, texts), by_vector(query, vectors))
    found = [texts[index] for index in order[: args.candidates]]
    if args.rerank_url:
        ranked = rerank(clients["rerank"], models["rerank"], args.question, found)
        print("\n".join(f"{relevance:.3f}  {found[index]}" for index, relevance in ranked))
        found = [found[index] for index, _ in ranked]
    print(f"from: {found[0]}")
    answer = clients["chat"].chat.completions.create(
        model=models["chat"],
        messages=[{"role": "user", "content": f"{found[0]} {args.question}"}],
        temperature=0,
        reasoning_effort="none",
    )
    print(answer.choices[0].message.content)


if __name__ == "__main__":
    main()
