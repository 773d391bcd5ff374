"""The local judge with tiny stand-ins: no guard's weights are reachable here.

A stand-in is a real tiny model and tokenizer read from a folder; where its words matter, `generate` is replaced by one that
looks at the text it is given and answers in the guard's form.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from commands import elsteer, one_sentence
from elsteer.errors import JudgeError
from elsteer.judges import get_judge
from elsteer.judges.local import LocalJudge
from tiny import tiny_model, tiny_tokenizer

SORRY, HELP = "I cannot help you with that, friend.", "Take the kettle off the stove and let it stand."


def guard(tmp_path: Path, name: str) -> str:
    folder = tmp_path / name
    tiny_model(max_position_embeddings=2048).save_pretrained(folder)
    tiny_tokenizer("chatml").save_pretrained(folder)
    return str(folder)


def speaking(judge: LocalJudge, words: Any) -> list[str]:
    """From now on the guard says words(text it was given). Returns the texts, as they come."""
    asked: list[str] = []
    tokenizer = judge._tokenizer

    def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            assert mask[-1] == 1, "a guard goes on from the last token: pads belong on the left"
            text = tokenizer.decode(ids[mask.bool()])
            asked.append(text)
            rows.append(torch.tensor(tokenizer(words(text), add_special_tokens=False)["input_ids"]))
        fresh = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        return torch.cat([input_ids, fresh], dim=1)

    judge._model.generate = generate  # type: ignore[assignment]
    return asked


def test_wildguard_reads_refusal_and_harm_apart(tmp_path: Path) -> None:
    judge = get_judge("local", model=guard(tmp_path, "tiny-wildguard"))
    assert isinstance(judge, LocalJudge)

    def words(text: str) -> str:
        refuses = "cannot" in text
        if "strange" in text:
            return "Well, that depends."
        refusal, harmful = ("yes", "no") if refuses else ("no", "yes")
        return f"Harmful request: yes\nResponse refusal: {refusal}\nHarmful response: {harmful}"

    asked = speaking(judge, words)
    prompts, texts = ["p1", "p2", "strange", "p4"], [SORRY, HELP, HELP, ""]
    found = judge.judge_many(prompts, texts)
    assert [one.label for one in found] == ["refusal", "compliance", "unscored", "unscored"]
    assert "Well, that depends" in found[2].reason
    assert len(asked) == 3, "an empty answer is not asked about"
    assert "Human user:\np1\n" in asked[0]
    assert f"AI assistant:\n{SORRY}\n" in asked[0]
    assert judge.harms(prompts, texts) == [0.0, 1.0, None, None], "no answer is not a harmless one"
    assert len(asked) == 6
    assert judge.decided("p", SORRY) is None


@pytest.mark.parametrize(
    ("name", "safe", "unsafe"),
    [
        ("tiny-Llama-Guard-3-1B", "\n\nsafe", "\n\nunsafe\nS2"),
        ("tiny-granite-guardian-3.1", "No", "Yes"),
        ("tiny-granite-guardian-3.3", "<score> no </score>", "<score> yes </score>"),
    ],
)
def test_guards_of_harm_leave_refusals_to_the_rules(tmp_path: Path, name: str, safe: str, unsafe: str) -> None:
    judge = LocalJudge(guard(tmp_path, name))
    if "granite" in name:
        judge._tokenizer.chat_template += "{{ guardian_config['criteria_id'] }}"
    asked = speaking(judge, lambda text: safe if "cannot" in text else unsafe)
    found = judge.judge_many(["p1", "p2"], [SORRY, HELP])
    assert [one.label for one in found] == ["refusal", "compliance"]
    assert not asked, "the rules read refusals"
    assert judge.name.endswith("refusals by rules")
    assert judge.harms(["p1", "p2"], [SORRY, HELP]) == [0.0, 1.0]
    assert "<|im_start|>assistant\n" + SORRY in asked[0]


# As that of Llama Guard 3 1B: parts of a message alone are read, and of a text there is nothing left.
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] | trim }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)


def test_a_template_that_reads_parts_is_given_parts(tmp_path: Path) -> None:
    judge = LocalJudge(guard(tmp_path, "tiny-Llama-Guard-3-1B"))
    judge._tokenizer.chat_template = PARTS
    asked = speaking(judge, lambda text: "safe" if "cannot" in text else "unsafe\nS2")
    assert judge.harms(["p1", "p2"], [SORRY, HELP]) == [0.0, 1.0]
    assert "user\np1<" in asked[0]
    assert f"assistant\n{SORRY}<" in asked[0]


@pytest.mark.parametrize(
    "template", ["{{ 'Is this harmful?' }}", "{{ messages[0]['content'] }}", "{{ raise_exception('no') }}"]
)
def test_a_template_that_leaves_the_answer_out_is_an_error(template: str, tmp_path: Path) -> None:
    judge = LocalJudge(guard(tmp_path, "tiny-llama-guard"))
    judge._tokenizer.chat_template = template
    speaking(judge, lambda text: "safe")
    with pytest.raises(JudgeError, match="chat template"):
        judge.harms(["p1"], [HELP])


def test_a_granite_guardian_that_is_asked_in_another_way_is_an_error(tmp_path: Path) -> None:
    judge = LocalJudge(guard(tmp_path, "tiny-granite-guardian-4.1"))
    speaking(judge, lambda text: "No, that is fine.")
    with pytest.raises(JudgeError, match="guardian_config"):
        judge.harms(["p1"], [HELP])


def test_granite_guardian_is_asked_about_harm_in_the_words_of_all_its_versions(tmp_path: Path) -> None:
    judge = LocalJudge(guard(tmp_path, "tiny-granite-guardian"))
    judge._tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
        "{{ 'risk ' ~ guardian_config['risk_name'] ~ ', criteria ' ~ guardian_config['criteria_id'] }}"
    )
    asked = speaking(judge, lambda text: "<think>\n</think>\n<score> yes </score>")
    assert judge.harms(["p1"], [HELP]) == [1.0]
    assert asked[0].endswith("risk harm, criteria harm")


def test_words_of_a_real_model_that_is_no_guard_are_unscored(tmp_path: Path) -> None:
    judge = LocalJudge(guard(tmp_path, "tiny-wildguard"), batch_size=2)
    found = judge.judge_many(["p1", "p2", "p3"], [SORRY, HELP, HELP])
    assert [one.label for one in found] == ["unscored"] * 3
    assert all("the guard said" in one.reason for one in found)
    assert judge.harms(["p1"], [HELP]) == [None]


def test_a_model_of_no_known_family_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match="no guard model that is known"):
        LocalJudge("someone/chatty-7b")
    with pytest.raises(JudgeError, match="no guard model that is known"):
        LocalJudge("ToxicityPrompts/PolyGuard-Qwen")  # its form is another than WildGuard's
    with pytest.raises(JudgeError, match="--judge-model"):
        get_judge("local")
    with pytest.raises(JudgeError, match="for the judge api, not for local"):
        get_judge("local", url="http://localhost", model="x")
    done = elsteer("judge", "--agreement", "none.jsonl", "--judge", "local", "--judge-model", "someone/chatty-7b")
    assert done.exit_code == 2
    one_sentence(done)
