"""Language models from disk: what fits is the library's own, what does not is refused before any work."""

import json
import shutil
import time

import pytest
import tiny
import tiny_hf
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from effbench import start
from effbench.errors import InvalidError, UsageError
from effbench.models.language import pretrained, reference


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("language")
    tiny_hf.llama(root / "llama")
    tiny_hf.gpt2(root / "gpt2")
    return root


@pytest.mark.parametrize("name, layers, context", [("llama", 3, 2048), ("gpt2", 2, 64)])
def test_a_model_on_disk(folders, name, layers, context):
    language, words, found = pretrained(str(folders / name))
    library = AutoModelForCausalLM.from_pretrained(folders / name).eval()
    ids = torch.tensor([words.encode("red circle beside the blue square")])
    with torch.no_grad():
        assert language(language.embed(ids)).allclose(library(input_ids=ids).logits, atol=1e-6)
    assert (found, words.start, words.end, len(words)) == (context, 1, 2, len(tiny_hf.IDS))
    assert words.decode([*words.encode("red circle"), 2, *words.encode("blue")]) == "red circle"
    assert language.body.config.num_hidden_layers == layers and not language.training


def test_files_are_read_once_and_arms_are_apart(folders, monkeypatch):
    reference.cache_clear()
    reads, read = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: reads.append(a) or read(*a, **k))
    name = str(folders / "llama")
    first, _, _ = pretrained(name)
    with torch.no_grad():
        first.head.weight.zero_()
    again, _, _ = pretrained(name)
    assert len(reads) == 1 and again.head.weight.abs().sum() > 0
    alone, _, _ = pretrained(name, single_use=True)
    assert len(reads) == 2 and alone.head.weight.equal(again.head.weight)


def broken(folders, tmp_path, file="config.json", name="llama", **values):
    """A copy of a model in which a file of facts says otherwise."""
    folder = tmp_path / "broken"
    shutil.copytree(folders / name, folder)
    facts = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps({key: value for key, value in facts.items() if value is not None}))
    return folder


def refused(folder, message, kind=InvalidError):
    with pytest.raises(kind, match=message):
        pretrained(str(folder))


def test_neither_here_nor_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("effbench.models.choose.reachable", lambda: False)
    began = time.monotonic()
    refused("nobody/nothing", "no such folder, and the hub has none or cannot be reached")
    refused(tmp_path / "nowhere", "nowhere: there is no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no config.json")
    assert time.monotonic() - began < 20  # no retries


def test_pickles_and_code_are_never_read(folders, tmp_path):
    folder = broken(folders, tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "pickled weights alone")
    shutil.rmtree(folder)
    mine = dict(AutoConfig="mine.Config", AutoModelForCausalLM="mine.Model")
    folder = broken(folders, tmp_path, model_type="mine", architectures=["Mine"], auto_map=mine)
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refused(folder, "cannot be loaded, in its files")
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_missing_or_damaged(folders, tmp_path):
    folder = broken(folders, tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if "layers.1" not in k}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, r"lack \d+ of its weights \(model.layers.1")
    (folder / "model.safetensors").write_bytes(b"damaged")
    refused(folder, "cannot be loaded, in its files")


def test_a_hidden_size_that_does_not_fit(folders, tmp_path):
    folder = broken(folders, tmp_path, hidden_size=32)
    refused(folder, r"do not fit its config.json: lm_head.weight is \d+x16 in the files and \d+x32")


def test_tokenizers_that_do_not_fit(folders, tmp_path):
    folder = broken(folders, tmp_path)
    for file in folder.glob("*token*"):
        file.unlink()
    refused(folder, "has no tokenizer|cannot be loaded, in its files")
    tiny_hf.tokenizer([f"<{i}>" for i in range(40)]).save_pretrained(folder)
    refused(folder, r"has \d+ tokens, its model embeds 48")
    shutil.rmtree(folder)
    shutil.copytree(folders / "llama", folder)
    tiny_hf.tokenizer(eos_token=None).save_pretrained(folder)
    refused(folder, "no end-of-text token")


def test_models_that_are_no_decoder(tmp_path):
    from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM

    small = dict(vocab_size=48, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2)
    bart = BartForConditionalGeneration(BartConfig(**small, **heads))
    tiny_hf._saved(tmp_path / "bart", tiny_hf.loud(bart), tiny_hf.tokenizer())
    refused(tmp_path / "bart", "is an encoder with a decoder", UsageError)
    sizes = dict(vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    tiny_hf._saved(tmp_path / "bert", tiny_hf.loud(BertForMaskedLM(BertConfig(**sizes))), tiny_hf.tokenizer())
    refused(tmp_path / "bert", "tokens look at those behind them", UsageError)


def test_a_class_that_does_more_is_refused(folders, tmp_path, monkeypatch):
    from transformers import CohereConfig, CohereForCausalLM  # it scales its logits

    config = {k: v for k, v in tiny_hf.LLAMA.items()} | dict(logit_scale=0.25)
    tiny_hf._saved(tmp_path / "more", tiny_hf.loud(CohereForCausalLM(CohereConfig(**config))), tiny_hf.tokenizer())
    refused(tmp_path / "more", "logits differ by.*more than its layers and its head", UsageError)


def run(data, decoder, **captioning):
    return start.run(
        (),
        "flickr8k_caption",
        backbone="shipped:scenes_vit",
        data=data,
        memory_runs=0,
        timing_pairs=2,
        timing_batch=2,
        controls="none",
        epochs=1,
        batch_size=4,
        threads=1,
        out=data / "out",
        captioning=dict(decoder=decoder, image_tokens=4, align_epochs=1, max_tokens=4, new_tokens=3) | captioning,
    )


def test_an_experiment(folders, tmp_path):
    data = tiny.flickr8k(tmp_path / "data", train=8, dev=2, test=2)
    record = run(data, f"hf:{folders / 'gpt2'}")
    arms = {arm.name: arm for arm in record.arms}
    assert not any(arm.error for arm in arms.values())
    assert record.envelope.protocol.captioning.stages == ("align",)
    tower, decoder = record.envelope.weights.split(", decoder ")  # another model in the same folder is another envelope
    assert tower.startswith("sha256:") and decoder.startswith("sha256:")
    with pytest.raises(InvalidError, match="context of 64 has room for 58"):
        run(data, f"hf:{folders / 'gpt2'}", max_tokens=59)
    with pytest.raises(UsageError, match="--decoder-layers 2 is of the tiny decoder"):
        run(data, f"hf:{folders / 'gpt2'}", layers=2)
    for unknown in ("llama", "hf:"):
        with pytest.raises(UsageError, match=f"--decoder {unknown} is not known"):
            run(data, unknown, layers=2)
