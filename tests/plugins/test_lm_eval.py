"""The model `elsteer` of the LM Evaluation Harness: steered like elsteer itself, and at strength 0 the harness's own."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from elsteer.completions import PromptCaches
from elsteer.decoding import prefill, score, share_prefix
from elsteer.errors import LandscapeError, ModelError, SteeringError
from elsteer.landscape import Landscape
from elsteer.models import encode_chat, fingerprint, load, render_chat
from landscapes import RULE, tiny_landscape
from pipelines import Tiny, forward_passes, some_prompts, speaker
from tiny import tiny_model, tiny_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'elsteer[lm-eval]'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from elsteer.plugins.lm_eval import ElsteerLM, main  # noqa: E402

STRENGTH = 4.0


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return tiny_model(max_position_embeddings=512), tiny_tokenizer()


@pytest.fixture(scope="module")
def landscape(tiny: Tiny) -> Landscape:
    return tiny_landscape(tiny[0])


def asked(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def chats(tiny: Tiny, count: int = 5) -> list[str]:
    return [render_chat(tiny[1], list(one.messages)) for one in some_prompts(count)]


def pairs(tiny: Tiny) -> list[tuple[str, str]]:
    """Contexts that end in a newline, as chats do, and continuations of one token and of several."""
    return [(chat, end) for chat in chats(tiny) for end in ("A", "B", "a longer one", "C", "A")]


def test_a_chat_is_asked_as_in_the_fit(tiny: Tiny) -> None:
    model, tokenizer = tiny
    fitted = tiny_landscape(model, provenance={"settings": {"collect": {"thinking": False}}})
    for given, expected in (({}, False), ({"enable_thinking": None}, None)):
        lm = ElsteerLM(model, fitted, tokenizer=tokenizer, **given)
        lm.steering.remove()
        assert lm.enable_thinking is expected


def test_several_processes_are_refused(tiny: Tiny, landscape: Landscape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SteeringError, match="one process"):
        ElsteerLM(tiny[0], landscape, tokenizer=tiny[1])


@pytest.mark.parametrize("thinking", [None, False, True])
@pytest.mark.parametrize("template", ["chatml", "gemma", "mistral", "qwen3"])
def test_the_fit_s_system_prompt_stands_before_a_chat_without_one(template: str, thinking: bool | None) -> None:
    """Where a template has no place for it, it is put before the user's words, as in the fit."""
    model, tokenizer = tiny_model(max_position_embeddings=512), tiny_tokenizer(template)
    fitted = {"system": "Be kind.", "thinking": thinking}
    landscape = tiny_landscape(model, provenance={"settings": {"collect": fitted}})
    landscape.fingerprint = fingerprint(model, tokenizer, thinking)
    user = [{"role": "user", "content": "Name a tree."}]
    for given in ({}, {"chat_template_args": {"today": "Monday"}}):
        lm = ElsteerLM(model, landscape, tokenizer=tokenizer, **given)
        lm.steering.remove()
        assert lm.apply_chat_template(user) == render_chat(tokenizer, user, system="Be kind.", thinking=thinking)
        own = [{"role": "system", "content": "Be brief."}, *user]
        assert lm.apply_chat_template(own) == render_chat(tokenizer, own, thinking=thinking)
        begun = lm.apply_chat_template([*user, {"role": "assistant", "content": "Oak"}], False)
        assert begun.endswith("Oak")
        assert "Be kind." in begun


def test_a_fit_with_thinking_is_asked_with_it(tiny: Tiny) -> None:
    model, tokenizer = tiny
    fitted = tiny_landscape(model, provenance={"settings": {"collect": {"thinking": True}}})
    lm = ElsteerLM(model, fitted, tokenizer=tokenizer)
    lm.steering.remove()
    assert lm.chat_template_args == {"enable_thinking": True}


def test_steered_log_likelihoods_are_those_of_elsteers_own_score(tiny: Tiny, landscape: Landscape) -> None:
    model, tokenizer = tiny
    requests = pairs(tiny)
    lm = ElsteerLM(model, landscape, STRENGTH, tokenizer=tokenizer, batch_size=4)
    with lm.steering:
        found = lm.loglikelihood([asked("loglikelihood", *one) for one in requests], disable_tqdm=True)
    rows = [tokenizer(context, add_special_tokens=False)["input_ids"] for context, _ in requests]
    answers = [tokenizer(end, add_special_tokens=False)["input_ids"] for _, end in requests]
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert rows[0] == encode_chat(tokenizer, list(some_prompts(1)[0].messages))
    assert rows[0][-1:] == newline
    batch = prefill(model, rows, list(range(len(rows))), share_prefix(model, rows))
    # What the harness sums begins with the newline, which the plain model predicts from the token before it.
    before = prefill(model, [row[:-1] for row in rows], list(range(len(rows))), share_prefix(model, rows))
    first = [one.log_softmax(dim=-1)[0, newline[0]] for one in score(model, before, [newline] * len(rows))]
    with landscape.attach(model, STRENGTH) as steering:
        steered = list(score(model, batch, answers, steering=steering))
    for (value, greedy), ids, logits, start in zip(found, answers, steered, first, strict=True):
        logs = logits.log_softmax(dim=-1)
        expected = start + logs.gather(1, torch.tensor(ids)[:, None]).sum()
        assert value == pytest.approx(float(expected), abs=1e-4)
        assert not greedy or logs.argmax(dim=-1).tolist() == ids
    plain = list(score(model, batch, answers))
    assert any(not torch.allclose(a, b, atol=1e-2) for a, b in zip(plain, steered, strict=True))


def test_a_continuation_is_greedy_where_the_steered_model_says_it() -> None:
    """Of a model that speaks in letters, so that what it says is a text; the plain one says something else."""
    model, tokenizer = speaker()
    landscape = tiny_landscape(model).with_rule(eta=1.0)
    contexts = [f"{one.text}:" for one in some_prompts(6)]
    with landscape.attach(model, STRENGTH):
        ids = [torch.tensor([tokenizer(one, add_special_tokens=False)["input_ids"]]) for one in contexts]
        made = [model.generate(one, max_new_tokens=3, do_sample=False)[0, one.shape[1] :] for one in ids]
    said = [str(tokenizer.decode(one)) for one in made]
    other = [text[:-1] + ("a" if text[-1] != "a" else "b") for text in said]
    pairs = [*zip(contexts, said, strict=True), *zip(contexts, other, strict=True)]
    requests = [asked("loglikelihood", *one) for one in pairs]
    lm = ElsteerLM(model, landscape, STRENGTH, tokenizer=tokenizer, batch_size=4)
    with lm.steering:
        steered = [greedy for _, greedy in lm.loglikelihood(requests)]
    assert steered == [True] * 6 + [False] * 6
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4).loglikelihood(requests)
    assert [greedy for _, greedy in plain] != steered


def test_at_strength_0_everything_is_hflms_to_the_bit(tiny: Tiny, landscape: Landscape) -> None:
    model, tokenizer = tiny
    likely = [asked("loglikelihood", *one) for one in (*pairs(tiny), ("", "no context"), ("ends in spaces  ", "x"))]
    rolling = [asked("loglikelihood_rolling", "a text by itself")]
    until = [asked("generate_until", chat, {"until": ["zz"], "max_gen_toks": 6}) for chat in chats(tiny)]
    own = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    expected = own.loglikelihood(likely), own.loglikelihood_rolling(rolling), own.generate_until(until)
    lm = ElsteerLM(model, landscape, 0, tokenizer=tokenizer, batch_size=3)
    with lm.steering:
        assert (lm.loglikelihood(likely), lm.loglikelihood_rolling(rolling), lm.generate_until(until)) == expected


def test_a_strength_near_0_gives_nearly_hflms(tiny: Tiny, landscape: Landscape) -> None:
    model, tokenizer = tiny
    requests = [asked("loglikelihood", *one) for one in (*pairs(tiny), ("", "no context"), ("in spaces  ", "x"))]
    expected = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3).loglikelihood(requests)
    lm = ElsteerLM(model, landscape, 1e-6, tokenizer=tokenizer, batch_size=3)
    with lm.steering:
        found = lm.loglikelihood(requests)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_the_same_tokens_cut_elsewhere_are_steered_elsewhere(tiny: Tiny, landscape: Landscape) -> None:
    model, tokenizer = tiny
    texts = [("abcd", "e"), ("abc", "de"), ("ab", "cde")]
    lm = ElsteerLM(model, landscape.with_rule(window=0), STRENGTH, tokenizer=tokenizer, batch_size=8)
    with lm.steering:
        together = lm.loglikelihood([asked("loglikelihood", *one) for one in texts])
        alone = [lm.loglikelihood([asked("loglikelihood", *one)])[0] for one in texts]
        with torch.inference_mode(), lm.steering.prompts(torch.tensor([4])):
            logits = model(input_ids=torch.tensor([tokenizer("abcd", add_special_tokens=False)["input_ids"]])).logits
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=1e-5)
    letter = tokenizer("e", add_special_tokens=False)["input_ids"][0]
    assert together[0][0] == pytest.approx(float(logits[0, -1].log_softmax(dim=-1)[letter]), abs=1e-5)


def test_the_letters_of_one_question_share_a_pass(tiny: Tiny, landscape: Landscape) -> None:
    lm = ElsteerLM(tiny[0], landscape, STRENGTH, tokenizer=tiny[1], batch_size=8)
    requests = [asked("loglikelihood", chat, letter) for chat in chats(tiny, 3) for letter in "ABCD"]
    with lm.steering, forward_passes(tiny[0]) as rows:
        lm.loglikelihood(requests)
    assert rows == [3]


def test_a_context_that_is_too_long_is_cut_on_the_left_and_its_end_is_steered(tiny: Tiny, landscape: Landscape) -> None:
    model, tokenizer = tiny
    lm = ElsteerLM(model, landscape, STRENGTH, tokenizer=tokenizer, max_length=12)
    with lm.steering:
        long, short = lm.loglikelihood(
            [asked("loglikelihood", "x" * 40 + "0123456789", "abc"), asked("loglikelihood", "0123456789", "abc")]
        )
        assert long == pytest.approx(short, abs=1e-5)
        with pytest.raises(SteeringError, match="leaves no room"):
            lm.loglikelihood([asked("loglikelihood", "context", "y" * 14)])


def test_generated_text_is_that_of_the_steered_model(tiny: Tiny, landscape: Landscape) -> None:
    model, tokenizer = tiny
    prompts = some_prompts(5)
    texts = [render_chat(tokenizer, list(one.messages)) for one in prompts]
    lm = ElsteerLM(model, landscape, STRENGTH, tokenizer=tokenizer, batch_size=2)
    with lm.steering:
        found = lm.generate_until([asked("generate_until", one, {"until": ["§"], "max_gen_toks": 6}) for one in texts])
    caches, expected = PromptCaches(model, tokenizer, prompts), {}
    with landscape.attach(model, STRENGTH):
        for place, ids in enumerate(caches.ids):
            made = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=6, do_sample=False)
            expected[place] = tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
    assert found == [expected[place] for place in range(len(prompts))]
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    assert found != plain.generate_until(
        [asked("generate_until", one, {"until": ["§"], "max_gen_toks": 6}) for one in texts]
    )


def test_what_cannot_be_steered_is_refused(tiny: Tiny, landscape: Landscape) -> None:
    model, tokenizer = tiny
    lm = ElsteerLM(model, landscape, STRENGTH, tokenizer=tokenizer)
    with lm.steering, pytest.raises(SteeringError, match="whole texts without a prompt"):
        lm.loglikelihood_rolling([asked("loglikelihood_rolling", "a text")])
    with pytest.raises(SteeringError, match="does not take peft"):
        ElsteerLM(model, landscape, tokenizer=tokenizer, peft="x")
    for size in ("auto:4", -1, "0", "many"):  # a negative one would leave all requests out in silence
        with pytest.raises(SteeringError, match="number for --batch_size"):
            ElsteerLM(model, landscape, tokenizer=tokenizer, batch_size=size)
    with pytest.raises(SteeringError, match="landscape=PATH"):
        ElsteerLM(model, tokenizer=tokenizer)
    with pytest.raises(SteeringError, match="pretrained=MODEL"):
        ElsteerLM(landscape=landscape)
    with pytest.raises(SteeringError, match=r"strength is one finite number.*not 'much'"):
        ElsteerLM(model, landscape, "much", tokenizer=tokenizer)
    with pytest.raises(SteeringError, match="Give the tokenizer"):
        ElsteerLM(model, landscape)
    with pytest.raises(LandscapeError, match="fitted to"):
        ElsteerLM(tiny_model(seed=1), landscape, tokenizer=tokenizer)


def test_a_model_of_ones_own_is_plain_again_once_it_is_gone(tiny: Tiny, landscape: Landscape) -> None:
    model, tokenizer = tiny
    inputs = landscape.encode(tokenizer, [{"role": "user", "content": "Hello"}])
    plain = model(**inputs).logits
    for strength in (1.0, 0.5):  # the second one can be attached
        lm = ElsteerLM(model, landscape, strength, tokenizer=tokenizer)
        assert not torch.equal(model(**inputs).logits, plain)
        del lm
        gc.collect()
        assert torch.equal(model(**inputs).logits, plain)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny model and its landscape as folders."""
    model = tiny_model(max_position_embeddings=512)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    tiny_landscape(model, rule=RULE).save_pretrained(tmp_path / "landscape")
    return tmp_path / "model", tmp_path / "landscape"


def test_the_harness_s_own_default_device_is_the_cpu_without_a_gpu(
    saved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its command line asks for cuda:0 wherever nothing else is asked for, and HFLM then takes what there is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lm = ElsteerLM(str(saved[0]), str(saved[1]), device="cuda:0")
    lm.steering.remove()
    assert lm.device.type != "cuda"
    with pytest.raises(ModelError, match="torch sees no GPU"):
        ElsteerLM(str(saved[0]), str(saved[1]), device="cuda:1")


def test_the_harness_finds_it_by_name_and_runs_a_task_on_it(
    saved: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question": f"Which {i}?", "choices": ["one", "two"], "answer": i % 2} for i in range(4)]
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(
        f"""task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.json"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
""",
        encoding="utf-8",
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = lm_eval.simple_evaluate(
        model="elsteer",
        model_args=f"pretrained={saved[0]},landscape={saved[1]},strength=2",
        tasks=["tiny_choices"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        device="cpu",
        batch_size=2,
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    samples = found["samples"]["tiny_choices"]
    assert samples[0]["arguments"][0][0].endswith("<|im_start|>assistant\n")
    taken = [max(range(2), key=[value for ((value, _),) in one["resps"]].__getitem__) for one in samples]
    assert (
        found["results"]["tiny_choices"]["acc,none"]
        == sum(t == one["target"] for t, one in zip(taken, samples, strict=True)) / 4
    )
    # What the harness was told is the model, the landscape and the strength.
    told = [value for one in samples for ((value, _),) in one["resps"]]
    requests = [asked("loglikelihood", *pair) for one in samples for pair in one["arguments"]]
    model, tokenizer = load(saved[0])
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2).loglikelihood(requests)
    for strength, same in ((2.0, True), (1.0, False)):
        lm = ElsteerLM(model, Landscape.from_pretrained(saved[1]), strength, tokenizer=tokenizer, batch_size=2)
        with lm.steering:
            values = [value for value, _ in lm.loglikelihood(requests)]
        assert (told == pytest.approx(values, abs=1e-4)) is same
    assert told != pytest.approx([value for value, _ in plain], abs=1e-4)


def test_an_error_of_elsteers_own_is_one_sentence_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise LandscapeError("There is no landscape nowhere.")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", fails)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "Error: There is no landscape nowhere.\n"
