"""Duplicates, near-duplicates and splits without leakage between them. Everything here is deterministic: the order of
the prompts that come in decides nothing about which prompts go where."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from elsteer.errors import PromptError
from elsteer.prompts.prompt import Prompt

__all__ = [
    "deduplicate",
    "group_near_duplicates",
    "normalise",
    "require_both_classes",
    "sample",
    "split_prompts",
    "without_near_duplicates",
]

DEFAULT_FRACTIONS = {"train": 0.6, "dev": 0.2, "test": 0.2}
_BLOCK = 2048  # rows of similarities held at once
# Words; each character of a script written without spaces is a word by itself, or no two such prompts would be alike.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+"


def normalise(text: str) -> str:
    """`text` in NFKC, case-folded, with single spaces and no punctuation at its end."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    end = len(folded)
    while end and unicodedata.category(folded[end - 1])[0] in "PZ":
        end -= 1
    return folded[:end] or folded


def deduplicate(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first of each set of prompts with the same chat after `normalise`, in the order given.

    Raises PromptError, which names the text, if one text is labelled both harmful and benign.
    """
    first: dict[Hashable, Prompt] = {}
    for prompt in prompts:
        kept = first.setdefault(_chat_key(prompt), prompt)
        if kept.harmful != prompt.harmful:
            raise PromptError(
                f"The same prompt is labelled both harmful and benign ({_named(kept)} and {_named(prompt)}): "
                f'"{_shortened(prompt.text)}"; decide which it is.'
            )
    return list(first.values())


def group_near_duplicates(prompts: Sequence[Prompt], threshold: float = 0.7) -> list[int]:
    """A group number for each prompt, counted from 0 in the order of first appearance.

    Two prompts are in one group if the cosine of their TF-IDF word vectors (over the user's messages) is at least
    `threshold`, if their normalised text is the same, if they have the same `family`, or through others between them.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    if not prompts:
        return []
    vectors = _vectors(prompts)
    edges = [_similar_pairs(vectors, vectors, threshold)]
    for keys in (_text_keys(prompts), _family_keys(prompts)):
        heads: dict[Hashable, int] = {}
        edges.append(np.array([(heads.setdefault(key, row), row) for row, key in keys], dtype=np.int64).reshape(-1, 2))
    left, right = np.concatenate(edges).T
    graph = coo_matrix((np.ones(len(left), dtype=np.int8), (left, right)), shape=(len(prompts), len(prompts)))
    _, labels = connected_components(graph, directed=False)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(int(label), len(numbers)) for label in labels]


def split_prompts(
    prompts: Sequence[Prompt],
    fractions: Mapping[str, float] | None = None,
    seed: int = 0,
    threshold: float = 0.7,
) -> dict[str, list[Prompt]]:
    """Prompts of each split, such that no group of near-duplicates or family stands in two splits.

    fractions: share of each split, summing to 1; by default 0.6 train, 0.2 dev, 0.2 test. They hold within each
    (harmful, source) as closely as whole groups allow: groups go, the largest first and else by seed, to the split
    that still wants most of their kind. Each split is sorted by id: only the set of prompts and the seed matter.
    """
    fractions = DEFAULT_FRACTIONS if fractions is None else fractions
    if not fractions or min(fractions.values()) <= 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise PromptError(f"The shares of the splits must be above 0 and sum to 1, not {dict(fractions)}.")
    ordered = sorted(prompts, key=lambda prompt: (prompt.id, prompt.source))
    groups: dict[int, list[Prompt]] = defaultdict(list)
    for prompt, number in zip(ordered, group_near_duplicates(ordered, threshold), strict=True):
        groups[number].append(prompt)

    wanted: dict[str, dict[tuple[bool, str], float]] = {name: defaultdict(float) for name in fractions}
    for prompt in ordered:
        for name, fraction in fractions.items():
            wanted[name][prompt.harmful, prompt.source] += fraction
    splits: dict[str, list[Prompt]] = {name: [] for name in fractions}
    for group in sorted(groups.values(), key=lambda group: (-len(group), _draw(seed, group[0].id))):
        kinds = [(prompt.harmful, prompt.source) for prompt in group]
        # The name breaks ties by its place in `fractions`, as max() takes the first.
        best = max(fractions, key=lambda name: round(sum(wanted[name][kind] for kind in kinds), 9))
        splits[best] += group
        for kind in kinds:
            wanted[best][kind] -= 1
    return {name: sorted(rows, key=lambda prompt: (prompt.id, prompt.source)) for name, rows in splits.items()}


def without_near_duplicates(prompts: Sequence[Prompt], of: Sequence[Prompt], threshold: float = 0.7) -> list[Prompt]:
    """Those of `prompts` that are close to none of `of`, in their order: the guard between fitting and evaluation.

    Close is as in `group_near_duplicates`, without the chains through others.
    """
    if not prompts or not of:
        return list(prompts)
    vectors = _vectors([*prompts, *of])
    close = set(_similar_pairs(vectors[: len(prompts)], vectors[len(prompts) :], threshold)[:, 0].tolist())
    for keys_of in (_text_keys, _family_keys):
        theirs = {key for _, key in keys_of(of)}
        close |= {row for row, key in keys_of(prompts) if key in theirs}
    return [prompt for row, prompt in enumerate(prompts) if row not in close]


def require_both_classes(prompts: Sequence[Prompt], what: str) -> None:
    """Raise PromptError, with what to do, unless `prompts` hold a harmful and a benign one. `what` names them."""
    if not prompts:
        raise PromptError(f"{what} holds no prompt: add some with --benign FILE and --harmful FILE.")
    if not any(prompt.harmful for prompt in prompts):
        raise PromptError(
            f"{what} holds no harmful prompt: safety cannot be measured; add prompts to be refused with --harmful FILE."
        )
    if all(prompt.harmful for prompt in prompts):
        raise PromptError(
            f"{what} holds no benign prompt: false refusals cannot be measured; add prompts to be answered with "
            "--benign FILE."
        )


def sample(prompts: Sequence[Prompt], n: int, seed: int = 0, by: Sequence[str] = ("source",)) -> list[Prompt]:
    """`n` of `prompts` drawn without replacement, in their order; all of them if they are no more than `n`.

    Each stratum (prompts with the same attributes `by`) gives its share, rounded by largest remainder. Which prompts
    are drawn depends on the seed and their ids, not on their order. Raises PromptError if n is below 1.
    """
    if n < 1:
        raise PromptError(f"The number of prompts to draw must be at least 1, not {n}.")
    if len(prompts) <= n:
        return list(prompts)
    strata: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        strata[tuple(getattr(prompt, name) for name in by)].append(row)
    share = {key: n * len(rows) / len(prompts) for key, rows in strata.items()}
    remainders = sorted(strata, key=lambda key: (-round(share[key] % 1, 9), _draw(seed, repr(key))))
    more = n - sum(int(part) for part in share.values())
    quota = {key: int(share[key]) + (rank < more) for rank, key in enumerate(remainders)}
    drawn: list[int] = []
    for key, rows in strata.items():
        drawn += sorted(rows, key=lambda row: _draw(seed, prompts[row].id))[: quota[key]]
    return [prompts[row] for row in sorted(drawn)]


def _draw(seed: int, key: str) -> str:
    """A place in a random order that depends on nothing else: stable over machines, versions and input order."""
    return hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()


def _similar_pairs(left: Any, right: Any, threshold: float) -> npt.NDArray[np.int64]:
    """Pairs (i, j), shape (n, 2), with left[i] . right[j] >= threshold; rows are sparse and of unit length (or zero).

    Prefix filtering (Bayardo, Ma, Srikant, WWW 2007), so that the long lists of common words are never multiplied out:
    a row is cut into common words p, of length below the threshold, and the rest r. By Cauchy-Schwarz the product is at
    most |p| + r . other, so that a pair is possible only where r . other >= threshold - |p| > 0. The result is exact.
    """
    common, length = _common_part(left, right, threshold)
    rare = left - common
    others = right.T.tocsr()
    found = []
    for start in range(0, left.shape[0], _BLOCK):
        partial = (rare[start : start + _BLOCK] @ others).tocoo()
        possible = partial.data >= threshold - length[start + partial.row] - 1e-9
        rows, columns = partial.row[possible] + start, partial.col[possible]
        full = np.asarray(left[rows].multiply(right[columns]).sum(axis=1)).ravel()
        close = full >= threshold - 1e-9
        found.append(np.stack([rows[close], columns[close]], axis=1).astype(np.int64))
    return np.concatenate(found) if found else np.empty((0, 2), dtype=np.int64)


def _common_part(left: Any, right: Any, threshold: float) -> tuple[Any, npt.NDArray[np.float64]]:
    """Each row's most common words while their length stays below the threshold, and that length."""
    count = np.bincount(right.indices, minlength=right.shape[1])
    common = left.copy()
    length = np.zeros(left.shape[0])
    for row in range(left.shape[0]):
        start, end = left.indptr[row], left.indptr[row + 1]
        order = np.argsort(-count[left.indices[start:end]], kind="stable")
        squares = np.cumsum(left.data[start:end][order] ** 2)
        kept = int(np.searchsorted(squares, (threshold - 1e-6) ** 2)) if threshold > 1e-6 else 0
        common.data[start:end][order[kept:]] = 0.0
        length[row] = np.sqrt(squares[kept - 1]) if kept else 0.0
    return common, length


def _vectors(prompts: Sequence[Prompt]) -> Any:
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [normalise(_user_text(prompt)) for prompt in prompts]
    vectorizer = TfidfVectorizer(token_pattern=_WORD, lowercase=False)
    try:
        return vectorizer.fit_transform(texts).tocsr()
    except ValueError:  # not one word in any of them
        return csr_matrix((len(texts), 1))


def _user_text(prompt: Prompt) -> str:
    return "\n".join(message["content"] for message in prompt.messages if message["role"] == "user")


def _text_keys(prompts: Sequence[Prompt]) -> list[tuple[int, Hashable]]:
    return [(row, normalise(_user_text(prompt))) for row, prompt in enumerate(prompts)]


def _family_keys(prompts: Sequence[Prompt]) -> list[tuple[int, Hashable]]:
    return [(row, prompt.family) for row, prompt in enumerate(prompts) if prompt.family]


def _chat_key(prompt: Prompt) -> Hashable:
    return tuple((message["role"], normalise(message["content"])) for message in prompt.messages)


def _named(prompt: Prompt) -> str:
    return f"{prompt.source or 'no source'}, id {prompt.id}"


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else text[:97] + "..."
