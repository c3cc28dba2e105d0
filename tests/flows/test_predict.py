"""Predictions: every task's answers, in the order of the rows, the same in any batches, gone on from where one stopped."""

from __future__ import annotations

import csv
import json

import pytest
import torch
import transformers

import hf_lnlm
from hf_lnlm.flows import predict as flow
from hf_lnlm.flows.answers import TaskAsker
from hf_lnlm.flows.lock import FolderLock

from ..cli.running import run, succeed

NAMES = ["good", "bad", "so so"]
TINY = {"hidden_size": 16, "num_hidden_layers": 1}
BERT = {**TINY, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves a checkpoint with fresh weights and a head, by name; each is made once."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def save(name, model_type, head, template=None, **fields):
        if name not in made:
            torch.manual_seed(0)
            tokenizer = hf_lnlm.build_tokenizer("byte", template=template)
            ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
            ids |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
            config = transformers.AutoConfig.for_model(model_type, **ids, **fields)
            model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
            for weight in model.parameters():
                weight.data.mul_(3)
            model.save_pretrained(made.setdefault(name, folder / name))
            tokenizer.save_pretrained(folder / name)
        return made[name]

    return save


def classes(**fields):
    return {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}, **fields}


def classifier(saved):
    return saved("classes", "lnlm_rnn", "SequenceClassification", **TINY, **classes())


TEXTS = [f"{'a very ' * (n % 5)}long film, number {n}" for n in range(13)]


def logits_of(folder, text, head="SequenceClassification"):
    model = getattr(transformers, f"AutoModelFor{head}").from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits[0]


def test_classes_with_scores_row_by_row(saved, tmp_path):
    folder, data = classifier(saved), tmp_path / "rows.csv"
    with data.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(TEXTS)])
    output = tmp_path / "out.jsonl"
    found = hf_lnlm.predict(folder, data, output=output, keep=["id"], **{"training.per_device_eval_batch_size": 4})
    assert found == [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["row"] for row in found] == list(range(1, 14)) and [row["id"] for row in found] == [
        *map(str, range(13))
    ]
    for text, row in zip(TEXTS, found):
        wanted = logits_of(folder, text).double().softmax(-1)
        assert list(row["scores"]) == NAMES and row["label"] == NAMES[int(wanted.argmax())]
        assert list(row["scores"].values()) == pytest.approx(wanted.tolist(), abs=2e-6)
        assert row["score"] == max(row["scores"].values())
    assert not list(tmp_path.glob("*.part"))
    given = [{"text": text, "label": "mine"} for text in TEXTS[:2]]
    beside = hf_lnlm.predict(folder, given, keep=["label", "text"])
    assert [(row["given_label"], row["text"], row["label"]) for row in beside] == [
        ("mine", text, row["label"]) for text, row in zip(TEXTS[:2], found)
    ]


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet", "tsv", "jsonl.gz"])
def test_every_format_and_python_rows_give_the_same(saved, tmp_path, ending):
    import gzip

    import datasets

    data, lines = tmp_path / f"rows.{ending}", [json.dumps({"text": text}) for text in TEXTS]
    if ending == "parquet":
        datasets.Dataset.from_list([{"text": text} for text in TEXTS]).to_parquet(data)
    elif ending == "jsonl.gz":
        data.write_bytes(gzip.compress("\n".join(lines).encode()))
    else:
        data.write_text("\n".join({"txt": TEXTS, "jsonl": lines, "tsv": ["text", *TEXTS]}[ending]) + "\n")
    found = succeed("predict", classifier(saved), "--data", data).out
    assert [json.loads(line) for line in found.splitlines()] == hf_lnlm.predict(classifier(saved), TEXTS)


def test_a_killed_run_goes_on_at_the_first_missing_row(saved, tmp_path, monkeypatch):
    folder, words = classifier(saved), {"training.per_device_eval_batch_size": 2}
    monkeypatch.setattr(flow, "CHUNK", 2)
    whole = tmp_path / "whole.csv"
    hf_lnlm.predict(folder, TEXTS, output=whole, **words)
    output, part = tmp_path / "out.csv", tmp_path / "out.csv.part"
    before, asked = flow._answers, []

    def dies(*arguments):
        for number, found in enumerate(before(*arguments)):
            if number == 2:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(flow, "_answers", dies)
    with pytest.raises(KeyboardInterrupt):
        hf_lnlm.predict(folder, TEXTS, output=output, **words)
    assert not output.exists() and len(part.read_text().splitlines()) == 9
    part.write_bytes(part.read_bytes()[:-20])  # the last line was half written
    monkeypatch.setattr(flow, "_answers", before)
    items = TaskAsker.items
    monkeypatch.setattr(TaskAsker, "items", lambda self, rows: asked.append(len(rows)) or items(self, rows))
    with pytest.raises(ValueError, match=r"begun with another data"):
        hf_lnlm.predict(folder, TEXTS[:-1], output=output, **words)
    assert len(hf_lnlm.predict(folder, TEXTS, output=output, **words)) == 13
    assert asked == [4, 4, 4, 1][1:] and output.read_bytes() == whole.read_bytes() and not part.exists()
    with pytest.raises(ValueError, match="is there already"):
        hf_lnlm.predict(folder, TEXTS, output=output, **words)
    assert len(hf_lnlm.predict(folder, TEXTS[:2], output=output, overwrite=True)) == 2


def test_tags_numbers_and_several_labels(saved, tmp_path):
    tagger = saved("tags", "lnlm_rnn", "TokenClassification", **TINY, **classes(bidirectional=True))
    rows = [{"tokens": ["a", "\x00", "film"]}, {"text": "so good"}, {"tokens": ["x"] * 50}]
    row, short, cut = hf_lnlm.predict(tagger, rows, settings=["data.block_size=20"])
    assert all(tag in NAMES for tag in row["tags"]) and len(short["tags"]) == 2
    assert cut["tags"][:10].count(None) == 0 and set(cut["tags"][10:]) == {None} and len(cut["scores"]) == 50
    logits = logits_of(tagger, "so good", "TokenClassification")
    assert short["tags"] == [NAMES[int(logits[at].argmax())] for at in (0, 3)]
    number = saved("number", "lnlm_rnn", "SequenceClassification", **TINY, num_labels=1, problem_type="regression")
    assert [row["value"] for row in hf_lnlm.predict(number, TEXTS[:3])] == pytest.approx(
        [float(logits_of(number, text)) for text in TEXTS[:3]], abs=1e-5
    )
    many = saved(
        "many", "lnlm_rnn", "SequenceClassification", **TINY, **classes(problem_type="multi_label_classification")
    )
    for text, row in zip(TEXTS, hf_lnlm.predict(many, TEXTS)):
        shares = logits_of(many, text).sigmoid()
        assert row["labels"] == [name for name, share in zip(NAMES, shares) if share > 0.5]
    output = tmp_path / "out.csv"
    hf_lnlm.predict(many, TEXTS, output=output)
    with output.open() as file:
        assert list(csv.DictReader(file))[3]["labels"] == "|".join(hf_lnlm.predict(many, TEXTS)[3]["labels"])


def test_answers_choices_and_texts(saved):
    reader = saved("reader", "bert", "QuestionAnswering", "bert", **BERT)
    context = "The first king was old. " * 6 + "His name was Ada."
    questions = [{"question": "who?", "context": context}, {"question": "what was it?", "context": "A cat."}]
    for asked, row in zip(questions, hf_lnlm.predict(reader, questions, settings=["objective.stride=8"])):
        assert row["answer"] and asked["context"][row["start"] :].startswith(row["answer"]) and 0 <= row["score"] <= 1
    chooser = saved("chooser", "bert", "MultipleChoice", "bert", **BERT)
    rows = [{"context": "It rained.", "choices": ["He ran.", "Cats.", "No"][: 2 + n % 2]} for n in range(5)]
    for asked, row in zip(rows, hf_lnlm.predict(chooser, rows)):
        assert row["text"] == asked["choices"][row["choice"]] and len(row["scores"]) == len(asked["choices"])
    t5 = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16, "decoder_start_token_id": 0}
    writer = saved("writer", "t5", "Seq2SeqLM", "t5", **t5)
    written = hf_lnlm.predict(writer, [{"source": text} for text in TEXTS[:5]], settings=["objective.max_new_tokens=4"])
    assert written == hf_lnlm.predict(writer, TEXTS[:5], settings=["objective.max_new_tokens=4"])
    assert all(set(row) == {"row", "text"} for row in written)


def test_perplexity_of_each_text_is_what_evaluation_measures(saved, tmp_path):
    for name, head, template in (("lnlm_rnn", "CausalLM", None), ("lnlm_linformer", "MaskedLM", "bert")):
        model = saved(f"{name}{head}", name, head, template, **TINY)
        found = hf_lnlm.predict(model, TEXTS, settings=["data.block_size=16"])
        assert found[4]["tokens"] > found[0]["tokens"] > 0
        assert all(row["perplexity"] == pytest.approx(2.718281828459045 ** row["loss"]) for row in found)
    causal, data = saved("lnlm_rnnCausalLM", "lnlm_rnn", "CausalLM"), tmp_path / "one.txt"
    text = (TEXTS[4] * 2)[:44]  # with both ends three whole rows: training and evaluation leave out a shorter one
    data.write_text(text)
    one = hf_lnlm.predict(causal, data, settings=["data.block_size=16"])[0]
    among = hf_lnlm.predict(causal, [*TEXTS[:4], text], settings=["data.block_size=16"])[4]
    assert {**among, "row": 1} == pytest.approx(one) and one["tokens"] == 45
    measured = hf_lnlm.evaluate(causal, data=str(data), save=False, settings=["data.block_size=16"]).result["metrics"]
    assert one["perplexity"] == pytest.approx(measured["perplexity"]) and one["loss"] == pytest.approx(measured["loss"])
    assert one["bits_per_byte"] == pytest.approx(measured["bits_per_byte"])


def test_what_does_not_fit_is_refused_before_anything_is_written(saved, tmp_path):
    folder, data = classifier(saved), tmp_path / "rows.jsonl"
    data.write_text('{"text": "good"}\n{"text": null}\n{"text": "bad", "row": 1}\n')
    for words, said in (
        (["--data", data, "--output", tmp_path / "out.txt"], "must end in .csv or .jsonl"),
        (["--data", data, "--output", tmp_path / "no" / "out.csv"], "in a folder that exists"),
        (["--data", data, "--output", tmp_path / "out.csv"], "line 2 (row 2): column 'text' must hold text, got null"),
        (["--data", data, "--output", tmp_path / "out.csv", "--resume"], "nothing to resume"),
        (["--data", data, "--text-column", "body"], "no column 'body'"),
        (["--data", data, "--keep", "id"], "line 1 (row 1): no column 'id' to keep"),
        (["--data", data, "--set", "training.max_steps=3"], "training.max_steps means nothing here"),
        (["--data", data, "--task", "span"], "has no answer for a single row"),
        (["--data", data, "--task", "question_answering"], "AutoModelForQuestionAnswering"),
        ([], "give --data"),
    ):
        result = run("predict", folder, *words)
        assert result.status == 2 and said in result.err, (said, result.err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]
    skipped = run("predict", folder, "--data", data, "--skip-bad-rows")
    assert [json.loads(line)["row"] for line in skipped.out.splitlines()] == [1, 3] and "skipped 1 of 3" in skipped.err


def test_an_output_is_written_by_one_at_a_time_and_nothing_of_others_is_lost(saved, tmp_path):
    folder, output, part = classifier(saved), tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    with FolderLock(tmp_path, output.name) as lock:
        lock.take()
        with pytest.raises(ValueError, match=r"out.jsonl is in use by a run \(process"):
            hf_lnlm.predict(folder, TEXTS[:2], output=output)
    assert not list(tmp_path.iterdir())
    for content in ("half a download", '{"text": "mine"}\n'):
        part.write_text(content)
        with pytest.raises(ValueError, match="no part of answers"):
            hf_lnlm.predict(folder, TEXTS[:2], output=output)
        assert part.read_text() == content
    part.write_text("")
    assert len(hf_lnlm.predict(folder, TEXTS[:2], output=output)) == 2 and list(tmp_path.iterdir()) == [output]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "good"}\n')
    for data in (rows, str(tmp_path / "*.jsonl"), [str(rows)]):
        with pytest.raises(ValueError, match="is read by this run"):
            hf_lnlm.predict(folder, data, output=rows, overwrite=True)
    assert rows.read_text() == '{"text": "good"}\n'
