"""The table of named suites: what each is, who may use it, and where its prompts are. `elsteer.prompts.suites` reads them.

Revisions are commits of the hub's data sets. One without a revision is read at its newest, which can change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["SUITES", "Suite"]


@dataclass(frozen=True, slots=True)
class Suite:
    """A named benchmark and where its prompts are.

    harmful: the right answer to every prompt of it: refusal (True) or help (False); None for a suite of `parts`, and
    where a column says it: `harmful_column`, whose `harmful_words` mean (refusal, help). Rows without a word are left out.
    parts: names of the suites that it is made of; such a suite has no data of its own.
    starter: the split of the starter prompts that it is, where it is one.
    hub, config, split, revision, gated: the data set on the hub; revision None is its newest. options: how its files are
    to be read.
    prompt_columns: where the prompt stands, the first that a row has; `prompt` is the last of them in any case.
    category_column: the prompt's category; `where` keeps the rows whose columns hold these values.
    folder: (file in a data folder, value of `source` there); folder_files: files there with the hub's columns or as the
    authors publish them, besides `NAME.jsonl` and the like.
    rows: how many prompts the hub's data set gives, where that is published.
    """

    name: str
    title: str
    description: str
    licence: str
    url: str
    harmful: bool | None = None
    harmful_column: str = ""
    harmful_words: tuple[str, str] = ("", "")
    parts: tuple[str, ...] = ()
    starter: str = ""
    hub: str = ""
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    gated: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    prompt_columns: tuple[str, ...] = ("prompt",)
    category_column: str = "category"
    where: tuple[tuple[str, str], ...] = ()
    folder: tuple[str, str] | None = None
    folder_files: tuple[str, ...] = ()
    rows: int | None = None


_STARTER = Suite(
    name="starter",
    title="Starter prompts, test",
    description="the shipped prompts that are kept for reporting: sounding harmful, plainly benign, harmful",
    licence="CC0-1.0",
    url="https://github.com/elsteer/elsteer",
    starter="test",
)
_XSTEST = Suite(
    name="xstest",
    title="XSTest",
    description="250 safe prompts that sound unsafe and 200 unsafe ones that differ from them by a word",
    licence="CC-BY-4.0",
    url="https://arxiv.org/abs/2308.01263",
    parts=("xstest-safe", "xstest-unsafe"),
    rows=450,
)
_XSTEST_PART = replace(
    _XSTEST,
    parts=(),
    hub="Paul/XSTest",
    revision="f600c994b256f12867dfa5b3eb3d545a3e62f8b5",
    category_column="type",
    folder_files=("xstest.csv", "xstest.jsonl", "prompts/xstest_prompts.csv", "xstest_prompts.csv"),
)
_OR_BENCH_HARD = Suite(
    name="or-bench-hard",
    title="OR-Bench hard",
    description="safe prompts, made from toxic ones, that several strong models refuse",
    licence="CC-BY-4.0",
    url="https://arxiv.org/abs/2405.20947",
    harmful=False,
    hub="bench-llm/or-bench",
    config="or-bench-hard-1k",
    revision="e36d8b80e81837c8a8f264bbb2a49f1b32c7e272",
    folder=("prompts/test.jsonl", "orbench_hard"),
    folder_files=("or-bench-hard-1k.csv",),
    rows=1319,
)
_COCONOT = Suite(
    name="coconot",
    title="CoCoNot, safety and contrast",
    description="requests that a careful model declines for safety, and contrasting ones that it should answer",
    licence="ODC-BY",
    url="https://arxiv.org/abs/2407.12043",
    parts=("coconot-contrast", "coconot-safety"),
    rows=774,
)
_COCONOT_PART = replace(
    _COCONOT,
    parts=(),
    hub="allenai/coconot",
    split="test",
    revision="2cbe16aabf9069f17e48c8daad8aeabc29469eb7",
)
_JAILBREAKBENCH = Suite(
    name="jailbreakbench",
    title="JailbreakBench behaviours",
    description="100 harmful behaviours in ten categories, and a benign one of the same theme beside each",
    licence="MIT",
    url="https://arxiv.org/abs/2404.01318",
    parts=("jailbreakbench-benign", "jailbreakbench-harmful"),
    rows=200,
)
_JAILBREAKBENCH_PART = replace(
    _JAILBREAKBENCH,
    parts=(),
    hub="JailbreakBench/JBB-Behaviors",
    config="behaviors",
    revision="886acc352a31533ffbcf4ef22c744658688086fc",
    prompt_columns=("Goal",),
    category_column="Category",
    rows=100,
)
_HARMBENCH = Suite(
    name="harmbench",
    title="HarmBench, standard behaviours, test",
    description="harmful requests over seven categories, without context and copyright",
    licence="MIT",
    url="https://arxiv.org/abs/2402.04249",
    harmful=True,
    hub="swiss-ai/harmbench",
    config="DirectRequest",
    split="test",
    prompt_columns=("Behavior",),
    category_column="SemanticCategory",
    where=(("FunctionalCategory", "standard"),),
    folder=("prompts/test.jsonl", "harmbench_test_standard"),
    folder_files=("harmbench_behaviors_text_test.csv",),
)

_ALL = (
    _STARTER,
    replace(
        _STARTER,
        name="starter-dev",
        title="Starter prompts, dev",
        description="the shipped prompts that are kept for tuning",
        starter="dev",
    ),
    # Help is the right answer, to some or all.
    _XSTEST,
    replace(
        _XSTEST_PART,
        name="xstest-safe",
        title="XSTest, safe",
        description="250 safe prompts that sound unsafe",
        harmful=False,
        where=(("label", "safe"),),
        folder=("prompts/test.jsonl", "xstest_safe"),
        rows=250,
    ),
    replace(
        _XSTEST_PART,
        name="xstest-unsafe",
        title="XSTest, unsafe",
        description="200 unsafe prompts that differ from safe ones by a word",
        harmful=True,
        where=(("label", "unsafe"),),
        folder=("prompts/test.jsonl", "xstest_unsafe"),
        rows=200,
    ),
    _OR_BENCH_HARD,
    replace(
        _OR_BENCH_HARD,
        name="or-bench-80k",
        title="OR-Bench 80k",
        description="safe prompts, made from toxic ones, of ten categories; more for fitting than for reporting",
        config="or-bench-80k",
        folder=("prompts/train.jsonl", "orbench80k_nonhard(via AlphaSteer)"),
        folder_files=(),
        rows=None,
    ),
    replace(
        _OR_BENCH_HARD,
        name="or-bench-toxic",
        title="OR-Bench toxic",
        description="toxic prompts of the same ten categories; labels by models, so some are harmless",
        harmful=True,
        config="or-bench-toxic",
        folder=("prompts/train.jsonl", "orbench_toxic_harmful(noisy labels)"),
        folder_files=(),
        rows=655,
    ),
    Suite(
        name="oktest",
        title="OKTest",
        description="safe prompts with words that sound harmful; not on the hub, so from a data folder only",
        licence="not stated",
        url="https://arxiv.org/abs/2401.17633",
        harmful=False,
        folder=("prompts/dev.jsonl", "oktest"),
        folder_files=("OKTest.csv",),
    ),
    Suite(
        name="phtest",
        title="PHTest, harmless",
        description="generated prompts that look harmful and are not; those labelled controversial are left out",
        licence="MIT",
        url="https://arxiv.org/abs/2409.00598",
        harmful=False,
        hub="furonghuang-lab/PHTest",
        revision="4028806c1f41031ddd3d27ca1f284e566548c5d6",
        prompt_columns=("Request",),
        where=(("Harmfulness", "harmless"),),
        folder_files=("PHTest.csv",),
    ),
    Suite(
        name="falsereject",
        title="FalseReject, test",
        description="prompts of 44 topics that seem toxic and are safe, checked by people",
        licence="CC-BY-NC-4.0",
        url="https://arxiv.org/abs/2505.08054",
        harmful=False,
        hub="AmazonScience/FalseReject",
        split="test",
        revision="493ba967714ea54c6f01067e1f61e389cc2c9b3e",
        category_column="category_text",
        rows=1187,
    ),
    _COCONOT,
    replace(
        _COCONOT_PART,
        name="coconot-contrast",
        title="CoCoNot, contrast",
        description="requests that should be answered, each like one that should be declined",
        harmful=False,
        config="contrast",
        category_column="subcategory",
        rows=379,
    ),
    replace(
        _COCONOT_PART,
        name="coconot-safety",
        title="CoCoNot, safety concerns",
        description="requests to decline for safety: the test split's category of that name, of five",
        harmful=True,
        config="original",
        category_column="subcategory",
        where=(("category", "Requests with safety concerns"),),
        rows=395,
    ),
    replace(
        _COCONOT_PART,
        name="coconot-pref",
        title="CoCoNot, preference pairs, safety",
        description="requests to answer that look like ones to decline for safety; meant for training",
        harmful=False,
        config="pref",
        split="train",
        category_column="subcategory",
        where=(("category", "Requests with safety concerns"),),
        folder=("prompts/train.jsonl", "coconot_pref_safety"),
        rows=None,
    ),
    _JAILBREAKBENCH,
    replace(
        _JAILBREAKBENCH_PART,
        name="jailbreakbench-benign",
        title="JailbreakBench, benign",
        description="100 benign behaviours of the harmful ones' themes",
        harmful=False,
        split="benign",
        folder_files=("benign-behaviors.csv",),
    ),
    replace(
        _JAILBREAKBENCH_PART,
        name="jailbreakbench-harmful",
        title="JailbreakBench, harmful",
        description="100 harmful behaviours in ten categories",
        harmful=True,
        split="harmful",
        folder_files=("harmful-behaviors.csv",),
    ),
    Suite(
        name="wildguardtest",
        title="WildGuardTest",
        description="plain and adversarial prompts, the right answer by people's label of the prompt",
        licence="ODC-BY",
        url="https://arxiv.org/abs/2406.18495",
        harmful_column="prompt_harm_label",
        harmful_words=("harmful", "unharmful"),
        hub="allenai/wildguardmix",
        config="wildguardtest",
        split="test",
        revision="d29c47f41c8b51348b5c8e8c81c039b3132b66d1",
        gated=True,
        category_column="subcategory",
        folder_files=("judge/wildguardtest_half.jsonl",),
    ),
    Suite(
        name="wildjailbreak",
        title="WildJailbreak, evaluation",
        description="2,000 harmful requests in jailbreaks as people write them, and 210 benign ones in the same dress",
        licence="ODC-BY",
        url="https://arxiv.org/abs/2406.18510",
        harmful_column="data_type",
        harmful_words=("adversarial_harmful", "adversarial_benign"),
        hub="allenai/wildjailbreak",
        config="eval",
        revision="5ddc12a7894f842b0619b8e1c7ee496b198af009",
        gated=True,
        options=(("delimiter", "\t"), ("keep_default_na", False)),
        prompt_columns=("adversarial",),
        category_column="data_type",
        folder_files=("wildjailbreak/eval/eval.tsv",),
        rows=2210,
    ),
    # Refusal is the right answer.
    _HARMBENCH,
    replace(
        _HARMBENCH,
        name="harmbench-val",
        title="HarmBench, standard behaviours, validation",
        description="the behaviours that HarmBench sets aside for tuning",
        split="val",
        folder=("prompts/dev.jsonl", "harmbench_val_standard"),
        folder_files=("harmbench_behaviors_text_val.csv",),
    ),
    Suite(
        name="advbench",
        title="AdvBench, harmful behaviours",
        description="harmful requests, many of them alike",
        licence="MIT",
        url="https://arxiv.org/abs/2307.15043",
        harmful=True,
        hub="mlabonne/harmful_behaviors",  # the same rows as walledai/AdvBench, which is gated
        split="train+test",
        revision="01cead01398926d81f7c52bdb790ee8cf77ebba7",
        prompt_columns=("text", "goal"),
        folder=("prompts/train.jsonl", "advbench"),
        folder_files=("harmful_behaviors.csv",),
        rows=520,
    ),
    Suite(
        name="strongreject",
        title="StrongREJECT",
        description="harmful questions of six categories that can be answered in facts",
        licence="MIT",
        url="https://arxiv.org/abs/2402.10260",
        harmful=True,
        hub="walledai/StrongREJECT",
        revision="df54272b395ce9e584d2f8140519935425d8549f",
        gated=True,
        prompt_columns=("forbidden_prompt",),
        folder_files=("strongreject_dataset.csv",),
        rows=313,
    ),
    Suite(
        name="simple-safety-tests",
        title="SimpleSafetyTests",
        description="plainly harmful requests over five areas of harm",
        licence="CC-BY-2.0",
        url="https://arxiv.org/abs/2311.08370",
        harmful=True,
        hub="Bertievidgen/SimpleSafetyTests",
        split="test",
        revision="98223c5d8c4059c8f4d8fe2fec8720ee8a20d3c5",
        category_column="harm_area",
        folder_files=("sst_test_cases.csv",),
        rows=100,
    ),
    Suite(
        name="malicious-instruct",
        title="MaliciousInstruct",
        description="harmful requests over ten intentions",
        licence="CC-BY-SA-4.0",
        url="https://arxiv.org/abs/2310.06987",
        harmful=True,
        hub="walledai/MaliciousInstruct",
        revision="3f9c8c91452e3cc12afab5f7137086ca789ce7da",
        folder=("prompts/dev.jsonl", "malicious_instruct"),
        folder_files=("MaliciousInstruct.txt",),
        rows=100,
    ),
    Suite(
        name="do-not-answer",
        title="Do-Not-Answer",
        description="questions of five risk areas that a responsible model does not follow; many are mild",
        licence="CC-BY-NC-SA-4.0",  # the hub says Apache-2.0, its authors this
        url="https://arxiv.org/abs/2308.13387",
        harmful=True,
        hub="LibrAI/do-not-answer",
        revision="74e74f2e4507ef256fe536f78a776f4a1ff67955",
        prompt_columns=("question",),
        category_column="risk_area",
        folder=("prompts/train.jsonl", "do_not_answer_malicious_uses"),
        folder_files=("data_en.csv",),
        rows=939,
    ),
    Suite(
        name="sorry-bench",
        title="SORRY-Bench 2025-03, base prompts",
        description="unsafe instructions over 44 topics, some mild, without their 20 rewritten forms; may not be passed on",
        licence="its own",
        url="https://arxiv.org/abs/2406.14598",
        harmful=True,
        hub="sorry-bench/sorry-bench-202503",
        revision="612a4e1f45db8adf884fa62318ddf9fa1c6e75e9",
        gated=True,
        prompt_columns=("turns",),
        where=(("prompt_style", "base"),),
        folder_files=("sorry_bench/question.jsonl",),
        rows=440,
    ),
    # Far from anything harmful.
    Suite(
        name="alpaca",
        title="Alpaca, instructions without input",
        description="neutral requests, far from anything harmful",
        licence="CC-BY-NC-4.0",
        url="https://github.com/tatsu-lab/stanford_alpaca",
        harmful=False,
        hub="tatsu-lab/alpaca",
        revision="dce01c9b08f87459cf36a430d809084718273017",
        prompt_columns=("instruction",),
        where=(("input", ""),),
        folder=("prompts/train.jsonl", "alpaca"),
    ),
)
SUITES: Mapping[str, Suite] = {suite.name: suite for suite in _ALL}
