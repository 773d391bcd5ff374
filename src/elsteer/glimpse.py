"""Verdicts for little more than the reading of a prompt: what the first generated token says of an answer.

Greedy answers that begin with the same token mostly get the same verdict ("I" of "I'm sorry", "The", "```"). A part of the
prompts is answered in full; `FirstTokenJudge` learns from these answers which first tokens decide the verdict, and tells
it of other answers after one token. Where the token does not decide, the answer is left unscored: no guess goes into the
training.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from elsteer.completions import Completion
from elsteer.files import read_rows, write_jsonl
from elsteer.judges import Label, Verdict

__all__ = ["FirstTokenJudge"]

LEAST = 4  # answers that must have begun with a token
SURE = 0.92  # the share of them that must have got the same verdict


@dataclass
class FirstTokenJudge:
    """Judges an answer by its first token. sure: by the token's text, the verdict and its share of the answers."""

    tokenizer: PreTrainedTokenizerBase
    sure: dict[str, tuple[Label, float]]
    name: str = "first token"

    @classmethod
    def learn(cls, tokenizer: PreTrainedTokenizerBase, answers: Iterable[Completion]) -> FirstTokenJudge:
        """Of answers with verdicts; unscored ones teach nothing."""
        seen: dict[str, Counter[Label]] = defaultdict(Counter)
        for one in answers:
            if one.label != "unscored":
                seen[_first(tokenizer, one.text)][one.label] += 1  # type: ignore[index]
        found: dict[str, tuple[Label, float]] = {}
        for token, labels in seen.items():
            label, count = labels.most_common(1)[0]
            if token and labels.total() >= LEAST and count >= SURE * labels.total():
                found[token] = (label, count / labels.total())
        return cls(tokenizer, found)

    def judge(self, prompt: str, completion: str) -> Verdict:
        """The verdict that the answer's first token tells; unscored where it does not decide."""
        token = _first(self.tokenizer, completion)
        if token not in self.sure:
            return Verdict("unscored", 0.5, "the first token does not decide")
        label, share = self.sure[token]
        return Verdict(label, share if label == "refusal" else 1 - share, f"first token {token!r}")

    def again(self, path: Path) -> None:
        """Judge the answers in `path` (rows of `complete`) once more; a file is rewritten where a verdict changed."""
        pairs = list(read_rows(path, lambda row: (row, {**row, **asdict(self.judge("", row["text"]))})))
        if any(row != told for row, told in pairs):
            write_jsonl(path, [told for _, told in pairs])

    def decided(self, prompt: str, partial: str) -> Verdict | None:
        """None: no more is generated than has to be."""
        return None


def _first(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids[:1], skip_special_tokens=True)).strip()
