"""Reading prompts: every format gives the same prompts, and every bad file gets one sentence with its place."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from elsteer.errors import PromptError
from elsteer.prompts import MAX_CHARS, Prompt, read_prompts

ROWS = [
    {"prompt": "How do I kill a Python process?", "harmful": False, "category": "homonyms"},
    {"prompt": 'He said "stop, now",\nand then? Größe\u2028x', "harmful": True, "category": "quotes"},
]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    def _write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return _write


Write = Callable[[str, "str | bytes"], Path]


def _table(delimiter: str) -> str:
    lines = [delimiter.join(ROWS[0])]
    for row in ROWS:
        lines.append(delimiter.join('"' + str(value).replace('"', '""') + '"' for value in row.values()))
    return "\r\n".join(lines) + "\r\n"


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import io

    import pyarrow as pa
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
        ("p.json", json.dumps(ROWS, indent=1)),
        ("p.csv", _table(",")),
        ("p.tsv", _table("\t")),
        ("p.parquet", _parquet(ROWS)),
    ],
)
def test_every_format_gives_the_same_prompts(write: Write, name: str, content: str | bytes) -> None:
    prompts = read_prompts(write(name, content))
    assert [(p.text, p.harmful, p.category, p.source) for p in prompts] == [
        (row["prompt"], row["harmful"], row["category"], "p") for row in ROWS
    ]


def test_a_byte_order_mark_is_no_part_of_the_first_column(write: Write) -> None:
    assert read_prompts(write("p.csv", b"\xef\xbb\xbfprompt,harmful\nhello,no\n"))[0].text == "hello"


def test_plain_text_holds_one_prompt_a_line(write: Write) -> None:
    prompts = read_prompts(write("p.txt", "one\r\n\n two \n"), harmful=True)
    assert [(p.text, p.harmful) for p in prompts] == [("one", True), ("two", True)]


def test_chats_keep_their_messages(write: Write) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rows = [{"messages": messages, "harmful": 0}, {"prompt": messages, "harmful": 0}]
    assert [list(p.messages) for p in read_prompts(write("p.jsonl", "\n".join(map(json.dumps, rows))))] == [
        messages
    ] * 2
    assert [list(p.messages) for p in read_prompts(write("p.parquet", _parquet(rows[:1])))] == [messages]


def test_a_run_folders_own_prompts_are_read_back_as_they_were(write: Write) -> None:
    prompt = Prompt.of("Hi", False, source="a", category="b", family="c")
    assert read_prompts(write("p.jsonl", json.dumps(prompt.to_row()))) == [prompt]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(True, True), (0, False), (1.0, True), ("YES", True), (" no ", False), ("Harmful", True), ("benign", False)],
)
def test_harmful_is_understood_in_many_words(write: Write, value: object, expected: bool) -> None:
    assert read_prompts(write("p.jsonl", json.dumps({"prompt": "x", "harmful": value})))[0].harmful is expected


def test_other_column_names_can_be_given(write: Write) -> None:
    path = write("p.csv", "question,label\nhow?,unsafe\n")
    assert read_prompts(path, prompt_column="question", harmful_column="label")[0].harmful
    assert not read_prompts(path, prompt_column="question", harmful=False)[0].harmful


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", "", "p.jsonl is empty"),
        ("p.jsonl", " \n\n", "p.jsonl is empty"),
        ("p.csv", "prompt,harmful\n", "holds no rows"),
        ("p.csv", "\ufeff", "p.csv"),
        ("p.json", "[]", "holds no rows"),
        ("p.parquet", _parquet([{"prompt": "x", "harmful": True}])[:-9], "not a whole Parquet file"),
        ("p.xlsx", "x", "unknown kind of file name; use one that ends in .jsonl"),
        ("p.jsonl", '{"question": "x", "n": 1}', "line 1 has no column 'prompt' .it has: question, n.: .*--prompt-col"),
        ("p.jsonl", '{"prompt": "x", "n": 1}', "line 1 has no column 'harmful' .it has: prompt, n..*--harmful-col"),
        ("p.txt", "x", "--benign or --harmful"),
        ("p.jsonl", '{"prompt": "x", "harmful": "maybe"}', "line 1: 'harmful' is 'maybe'; it must be true or false"),
        ("p.jsonl", '{"prompt": "x", "harmful": 2}', "'harmful' is 2"),
        ("p.jsonl", '{"prompt": "x", "harmful": null}', "'harmful' is None"),
        ("p.jsonl", '{"prompt": "x", "harmful": 1}\n\n{"prompt": "y"', "line 3 is not JSON .*one JSON object"),
        ("p.jsonl", "[" * 100_000, "line 1 is not JSON .nested too deeply"),
        ("p.json", '[{"prompt": "x"},\n{"prompt" "y"}]', "line 2 is not JSON"),
        ("p.jsonl", "3", "line 1 is a number"),
        ("p.jsonl", '{"prompt": "  ", "harmful": 1}', "line 1: the prompt is empty"),
        ("p.jsonl", '{"prompt": null, "harmful": 1}', "line 1: the prompt is empty"),
        ("p.jsonl", '{"prompt": 3, "harmful": 1}', "'prompt' is a number .3.; it must be text"),
        ("p.jsonl", '{"prompt": {"a": 1}, "harmful": 1}', "'prompt' is an object"),
        ("p.jsonl", '{"messages": [], "harmful": 1}', "the prompt is empty"),
        ("p.jsonl", '{"messages": ["x"], "harmful": 1}', "message 1 must be an object"),
        ("p.jsonl", '{"messages": [{"role": "human", "content": "x"}], "harmful": 1}', "the role 'human'; the roles"),
        ("p.jsonl", '{"messages": [{"role": "user", "content": 1}], "harmful": 1}', "content of message 1 is a number"),
        ("p.jsonl", '{"prompt": "\\ud800", "harmful": 1}', "line 1: the prompt holds half of a character"),
        ("p.jsonl", '{"prompt": "x", "harmful": 1, "id": "a\\udc00"}', "line 1: 'id' holds half of a character"),
        ("p.jsonl", '{"prompt": "x", "harmful": 1, "source": "\\ud800"}', "line 1: 'source' holds half of a character"),
        ("p.jsonl", '{"prompt": "x", "harmful": 1, "category": []}', "'category' is a list; it must be text"),
        ("p.csv", "prompt,harmful\na, b,1\n", "line 2 has 3 fields where the header has 2: put quotes"),
        ("p.csv", 'prompt,harmful\n"a\nb",1\n"c,1\n', "line 4 is broken .*every quote is closed"),
        ("p.csv", "prompt,prompt\na,b\n", "two columns named 'prompt'"),
        ("p.csv", 'prompt,harmful\n"a\nb",1\n,0\n', "line 4: the prompt is empty"),
        ("p.jsonl", b'{"prompt": "\xe4"}\n{"prompt": "\xe4"}', "line 1 is not UTF-8 .byte 0xe4 at position 12"),
        ("p.csv", b"\xef\xbb\xbfprompt\nok\nb\xe4d\n", "line 3 is not UTF-8 .byte 0xe4 at position 14"),
        ("p.txt", "hello".encode("utf-16"), "UTF-16"),
    ],
)  # fmt: skip
def test_a_bad_file_gets_one_sentence_with_its_place(write: Write, name: str, content: str | bytes, said: str) -> None:
    path = write(name, content)
    with pytest.raises(PromptError, match=said) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "caf\udce9.txt").write_text("Hello\n")
    with pytest.raises(PromptError, match=r"caf\\udce9\.txt' is not UTF-8: rename the file"):
        read_prompts(tmp_path / "caf\udce9.txt", harmful=False)


def test_the_last_message_must_be_the_users(write: Write) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with pytest.raises(PromptError, match="line 1: the last message is from the assistant"):
        read_prompts(write("p.jsonl", json.dumps({"messages": chat, "harmful": False})))


def test_a_missing_file_and_a_folder_are_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"nope.jsonl was not found"):
        read_prompts(tmp_path / "nope.jsonl")
    (tmp_path / "f.csv").mkdir()
    with pytest.raises(PromptError, match="is a folder"):
        read_prompts(tmp_path / "f.csv")


def test_two_prompts_of_one_id_are_refused_and_one_prompt_twice_is_not(write: Write) -> None:
    rows = [{"id": 7, "prompt": "a", "harmful": 0}, {"id": "7", "prompt": "b", "harmful": 0}]
    with pytest.raises(PromptError, match=r"line 2 has the id '7' of another prompt \(line 1\)"):
        read_prompts(write("p.jsonl", "\n".join(map(json.dumps, rows))))
    assert [p.id for p in read_prompts(write("p.jsonl", "\n".join(map(json.dumps, rows[:1] * 2))))] == ["7", "7"]


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.txt"])
def test_a_prompt_of_ten_megabytes_fails_clearly_and_quickly(write: Write, name: str) -> None:
    long = "word " * 2_000_000
    content = {"p.jsonl": json.dumps({"prompt": long}), "p.csv": f"prompt\n{long}\n", "p.txt": long}[name]
    path, started = write(name, content), time.process_time()
    with pytest.raises(PromptError, match=rf"line \d: the prompt has [\d,]+ characters, more than the {MAX_CHARS:,}"):
        read_prompts(path, harmful=False)
    assert time.process_time() - started < 5


def test_a_file_of_ten_megabytes_is_read_in_seconds(write: Write) -> None:
    path = write(
        "p.jsonl", "".join(json.dumps({"prompt": f"{n} " + "x" * 180, "harmful": 0}) + "\n" for n in range(50_000))
    )
    started = time.process_time()
    assert len(read_prompts(path)) == 50_000
    assert time.process_time() - started < 10


def test_files_are_read_without_waiting_for_torch(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("Hello\n")
    script = f"import sys; from elsteer.prompts import read_prompts; read_prompts({str(tmp_path / 'mine.txt')!r}, harmful=False)"
    subprocess.run([sys.executable, "-c", f"{script}; assert 'torch' not in sys.modules"], check=True)


def test_a_hub_that_cannot_be_reached_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    started = time.perf_counter()
    with pytest.raises(
        PromptError,
        match=r"nobody/nothing could not be read, as http://127.0.0.1:9 could not be reached.*check the connection",
    ):
        read_prompts("nobody/nothing")
    assert time.perf_counter() - started < 5


def test_a_hub_that_is_down_is_not_asked_for_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Down(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(503)

        def log_message(self, format: str, *args: object) -> None:
            pass

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Down) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(PromptError, match="answered with error 503"):
            read_prompts("nobody/nothing")
        server.shutdown()


@pytest.mark.parametrize(
    ("said_by_hub", "said"),
    [
        ("Dataset 'a/b' is a gated dataset on the Hub. Ask for access.", "a/b is gated.*access on .*/datasets/a/b"),
        ("Config name is missing.\nPlease pick one: ['x', 'y']", r"several configurations .*'x', 'y'.*a/b:CONFIG"),
        ('Unknown split "train". Should be one of [\'test\'].', r"split train \(Unknown split .*check the id"),
    ],
)  # fmt: skip
def test_what_the_hub_says_becomes_one_sentence(monkeypatch: pytest.MonkeyPatch, said_by_hub: str, said: str) -> None:
    def load_dataset(*args: object, **kwargs: object) -> None:
        raise ValueError(said_by_hub)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("elsteer.models.hub.hub_problem", lambda: None)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(PromptError, match=said) as caught:
        read_prompts("a/b")
    assert "\n" not in str(caught.value)


def test_offline_a_data_set_that_was_never_downloaded_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PromptError, match=r"nobody/nothing, split train, was not downloaded.*unset HF_HUB_OFFLINE"):
        read_prompts("nobody/nothing")


def test_a_hub_data_set_is_read_with_its_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    asked: list[tuple[object, ...]] = []

    def load_dataset(path: str, name: str | None, *, split: str, revision: str | None) -> Dataset:
        asked.append((path, name, split, revision))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("elsteer.models.hub.hub_problem", lambda: None)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    prompts = read_prompts("a/b:c", split="test", revision="abc")
    assert [p.text for p in prompts] == [row["prompt"] for row in ROWS]
    assert prompts[0].source == "a/b"
    assert asked == [("a/b", "c", "test", "abc")]
