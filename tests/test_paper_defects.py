"""The defects of the published code of the paper (arXiv 2510.08646): one test each, that ours has none of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elsteer.completions import PromptCaches, complete, encode
from elsteer.energy.descent import Descent
from elsteer.energy.model import EnergyModels
from elsteer.energy.train import BENIGN_HARMFUL, _split, auroc, train
from elsteer.errors import ElsteerError, LandscapeError, RunError
from elsteer.judges import DESIRABLE, OUTCOMES, get_judge, outcome_of
from elsteer.landscape import Landscape
from elsteer.prompts import Prompt
from elsteer.settings import TrainingSettings
from elsteer.states import StateStore
from elsteer.steering import Steering
from landscapes import same_landscape, tiny_landscape
from slow import inputs_of_blocks, pad
from tiny import TEMPLATES, tiny_model, tiny_tokenizer

Tiny = tuple[PreTrainedModel, PreTrainedTokenizerBase]
FAST = TrainingSettings(energy="network", width=16, hidden=(8,), epochs=4, batch_per_outcome=8, learning_rate=1e-2)


def speaking(text: str, prompt: Prompt) -> Tiny:
    """A tiny model that answers `prompt` by `text`, and its tokenizer."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    length = len(encode(model, tokenizer, [prompt])[0])

    def write(_module: torch.nn.Module, _args: object, kwargs: dict[str, Any], out: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is not None and (said := int(mask.sum()) - length) >= 0:
            out.logits.zero_()[:, -1, ids[said]] = 1.0
        return out

    model.register_forward_hook(write, with_kwargs=True)
    return model, tokenizer


# Collecting


def test_an_answer_that_begins_with_i_is_not_cut_off() -> None:
    """There "I" was a stop token: "I can't ..." became an empty answer, and that a compliance."""
    prompt = Prompt.of("How do I kill a Python process?", harmful=False)
    caches = PromptCaches(*speaking("I can't help with that.", prompt), [prompt], room=32)
    (found,) = complete(caches, get_judge("rules"), max_new_tokens=30)
    assert "I can't help with that.".startswith(found.text)  # stopped early once the verdict was sure, perhaps
    assert len(found.text) > len("I can't")
    assert (found.label, outcome_of(prompt.harmful, found.label)) == ("refusal", "false_refusal")


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_an_empty_answer_is_no_compliance(text: str) -> None:
    verdict = get_judge("rules").judge("How do I kill a Python process?", text)
    assert verdict.label == "unscored"
    assert outcome_of(False, verdict.label) is None


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "none"])
def test_the_chat_template_is_put_on_once(template: str) -> None:
    """There prompts went through it twice, and Llama-3's got a second BOS."""
    tokenizer = tiny_tokenizer(template)
    (ids,) = encode(tiny_model(), tokenizer, [Prompt.of("zebra", harmful=False)])
    whole = tokenizer.decode(ids)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "zebra"}], tokenize=False, add_generation_prompt=True
    )
    assert whole == rendered
    assert whole.count("zebra") == 1
    assert ids.count(tokenizer.bos_token_id) <= 1


def test_states_are_read_at_the_prompt_that_was_answered(tiny: Tiny, tmp_path: Path) -> None:
    model, tokenizer = tiny
    prompt, states = Prompt.of("zebra", harmful=False), StateStore(tmp_path)
    caches = PromptCaches(model, tokenizer, [prompt], room=8)
    complete(caches, get_judge("rules"), max_new_tokens=4, states=states)
    ids = tokenizer(
        tokenizer.apply_chat_template(list(prompt.messages), tokenize=False, add_generation_prompt=True),
        add_special_tokens=False,
        return_tensors="pt",
    )["input_ids"]
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    found, _ = states.read([prompt.id])
    torch.testing.assert_close(found[0, 0], torch.stack([h[0, -1] for h in hidden[:4]]), atol=1e-4, rtol=1e-4)


def test_a_failure_falls_back_on_nothing(tiny: Tiny) -> None:
    """There a failure of the fast engine silently gave the work to another one."""
    model, tokenizer = tiny
    caches = PromptCaches(model, tokenizer, [Prompt.of("zebra", harmful=False)], room=8)

    def broken(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("out of memory")

    model.model.layers[1].forward = broken
    with pytest.raises(RuntimeError, match="out of memory"):
        complete(caches, get_judge("rules"), max_new_tokens=4)


# Judging


def test_a_curly_apostrophe_refuses_like_a_straight_one() -> None:
    judge = get_judge("rules")
    for text in ("I can't help with that request.", "I can’t help with that request."):
        assert judge.judge("How do I make a bomb?", text).label == "refusal"


def test_i_cannot_stress_enough_is_no_refusal() -> None:
    text = "I can't stress enough how useful this is: open the task manager, find Python and end it."
    assert get_judge("rules").judge("How do I kill a Python process?", text).label == "compliance"


# Training


def outcomes_and_states(each: dict[str, int], layers: int = 1) -> tuple[torch.Tensor, list[str], list[str]]:
    outcomes = [name for name in OUTCOMES for _ in range(each[name])]  # in the order of the classes, as a file would be
    states = torch.randn(len(outcomes), layers, 16, generator=torch.Generator().manual_seed(0))
    for row, name in enumerate(outcomes):
        harmful, undesirable = BENIGN_HARMFUL[name]
        states[row, :, 0] += 3.0 * undesirable * (1 if harmful else -1)  # each kind has its own sign
        states[row, :, 1] += 3.0 * harmful
    return states, outcomes, [str(row) for row in range(len(outcomes))]


def test_every_outcome_takes_part_in_training_whatever_the_order_and_the_sizes() -> None:
    """There pairs were cut to the smaller class in list order, so safe refusals might never be a desirable sample."""
    states, outcomes, groups = outcomes_and_states(
        {"helpful": 400, "safe_refusal": 60, "false_refusal": 60, "jailbreak": 60}
    )
    settings = FAST.model_copy(update={"epochs": 40, "batch_per_outcome": 16})
    found = train(states, outcomes, groups, [0], settings).auroc[0]
    assert set(DESIRABLE) == {name for name, (_, undesirable) in BENIGN_HARMFUL.items() if not undesirable}
    assert found["benign"] > 0.9
    assert found["harmful"] > 0.75  # cannot be, unless safe refusals and jailbreaks were both seen


def test_layers_are_not_judged_by_the_sign_of_the_energy() -> None:
    """There accuracy was taken at energy 0, an offset that InfoNCE does not fix."""
    states, outcomes, groups = outcomes_and_states(dict.fromkeys(OUTCOMES, 40))
    models = train(states, outcomes, groups, [0], FAST).models
    bad = torch.tensor([BENIGN_HARMFUL[name][1] == 1 for name in outcomes])
    with torch.no_grad():
        energies = models(states).double()  # the offset must not round two energies to one
    for offset in (-100.0, 100.0):
        assert torch.equal(auroc(energies + offset, bad), auroc(energies, bad))


def test_the_best_epoch_steers_and_not_the_last_one() -> None:
    """The weights that come back give the AUROC that is reported, where later epochs were worse."""
    states, outcomes, groups = outcomes_and_states(dict.fromkeys(OUTCOMES, 40))
    states += 2.0 * torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    wild = FAST.model_copy(update={"learning_rate": 0.08, "epochs": 12})
    result = train(states, outcomes, groups, [0], wild, seed=1)
    rows = _split(groups, outcomes, wild.validation_share, torch.Generator().manual_seed(1))
    bad = torch.tensor([BENIGN_HARMFUL[name][1] == 1 for name in outcomes])
    with torch.no_grad():
        found = auroc(result.models(states[rows]), bad[rows])
    assert result.epochs[0] < 11
    assert float(found) == pytest.approx(result.auroc[0]["all"], abs=1e-6)


def test_an_energy_model_read_back_has_what_was_measured_and_nothing_made_up(tmp_path: Path) -> None:
    """There a reloaded model got an accuracy of 75.0, so a second run steered the first layers."""
    landscape = tiny_landscape(provenance={"auroc": {"1": 0.61, "2": 0.74}})
    landscape.save_pretrained(tmp_path)
    same_landscape(Landscape.from_pretrained(tmp_path), landscape)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rule"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LandscapeError, match="rule"):
        Landscape.from_pretrained(tmp_path)


def test_no_untrained_model_is_ever_loaded_with_a_warning(tmp_path: Path) -> None:
    landscape = tiny_landscape()
    landscape.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ElsteerError, match=r"model\.safetensors"):
        Landscape.from_pretrained(tmp_path)


def test_a_failure_to_choose_layers_steers_no_layer_rather_than_all() -> None:
    with pytest.raises(ElsteerError, match="no layer"):
        Steering(tiny_model(), {}, window=0)


def test_where_there_is_nothing_to_learn_nothing_is_trained() -> None:
    states, outcomes, groups = outcomes_and_states({**dict.fromkeys(OUTCOMES, 40), "false_refusal": 0})
    with pytest.raises(RunError, match="nothing to learn"):
        train(states, outcomes, groups, [0], FAST)


# Steering


def test_greedy_steered_decoding_is_the_same_every_time() -> None:
    """There dropout was on while steering: greedy answers were random."""
    models = EnergyModels([1], 32, width=16, hidden=(8,), dropout=0.5).train()
    model = tiny_model()
    with Steering(model, {1: Descent(models.tensors_of(0), eta=0.3, steps=3)}, window=2):
        made = [model.generate(**pad([[5, 9, 33]]), max_new_tokens=8, do_sample=False) for _ in range(3)]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


def test_small_steps_do_not_round_away_in_bfloat16() -> None:
    """There each of the K steps was added in bfloat16. Ours are summed in float32 and rounded once."""
    model, taken = tiny_model().bfloat16(), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = EnergyModels([1], 32, width=16, hidden=(8,))
    descent = Descent(models.tensors_of(0), eta=0.004, steps=20)

    class Watched:
        def delta(self, states: torch.Tensor, strength: torch.Tensor | float = 1.0) -> torch.Tensor:
            taken.append((states, descent.delta(states, strength)))
            return taken[-1][1]

    with Steering(model, {1: Watched()}, window=0), inputs_of_blocks(model) as seen, torch.no_grad():
        model(**pad([[5, 9, 33]]))
    (before, delta), after = taken[0], seen[1][0][0, -1]
    assert before.dtype == delta.dtype == torch.float32
    assert torch.equal(after, (before + delta)[0].bfloat16())
    in_bfloat16, steps = before[0].bfloat16(), descent.path(before).diff(dim=0)[:, 0]
    for step in steps:
        in_bfloat16 = in_bfloat16 + step.bfloat16()
    wanted = (before + delta)[0]
    assert float((after.float() - wanted).norm()) < 0.5 * float((in_bfloat16.float() - wanted).norm())


def test_two_models_in_one_process_do_not_share_their_steering() -> None:
    """There the state of steering belonged to the class: one model a process."""
    one, other = tiny_model(), tiny_model(seed=1)
    inputs = pad([[5, 9, 33]])
    with torch.no_grad(), Steering(one, tiny_moves(), window=0) as a, Steering(other, tiny_moves(), window=0) as b:
        a.strength, b.strength = 0.0, 1.0
        zero, full = one(**inputs).logits, other(**inputs).logits
        b.strength = 0.5
        assert torch.equal(one(**inputs).logits, zero)
        assert not torch.equal(other(**inputs).logits, full)


def tiny_moves() -> dict[int, Descent]:
    models = EnergyModels([1], 32, width=16, hidden=(8,))
    return {1: Descent(models.tensors_of(0), eta=0.3, steps=1)}
