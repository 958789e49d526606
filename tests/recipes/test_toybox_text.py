"""The text encoder learns what captions say, in both languages, and a transformer goes on reading it."""

import torch
from tiny_pipeline import make_pipeline
from transformers import AutoTokenizer, T5EncoderModel

import opensora
from opensora.distributed.seeding import BatchKey
from opensora.recipes.toybox_text import WordingTask, WordingTaskConfig
from opensora.toybox.captions import VOCABULARY, language_of
from opensora.training.config import LoopConfig, Recipe
from opensora.training.diffusion.text import TrainedText, build_trained_encoder
from opensora.training.optimizer import OptimizerConfig
from opensora.training.trainer import Trainer

ENCODER = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "feed_forward_proj": "gated-gelu"}


def test_attributes_are_learnt_from_both_languages(tmp_path):
    config = WordingTaskConfig(encoder=ENCODER, batch_size=16)
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=5)
    losses = []
    loop = LoopConfig(steps=30, precision="fp32", optimizer=optimizer)
    Trainer(Recipe("words", config, loop), tmp_path, on_step=lambda step, steps, f: losses.append(f["loss"])).run()
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    encoder = T5EncoderModel.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokens = tokenizer(["一个小红球", "a small red ball"], padding="longest", return_tensors="pt")
    assert encoder(**{k: tokens[k] for k in ("input_ids", "attention_mask")}).last_hidden_state.shape[2] == 32


def test_a_transformer_reads_english_as_it_did(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "before")
    before = str(tmp_path / "before")
    task = WordingTask(WordingTaskConfig(init_from=before, reader=before, batch_size=8), "cpu")
    task.encoder.eval()  # which drops nothing out
    terms = task.loss(task.prepare(BatchKey(0, 0)), BatchKey(0, 0))
    assert float(terms["reading"].detach().max()) < 1e-6, "nothing has been learnt yet"
    with torch.no_grad():
        task.encoder.get_input_embeddings().weight.mul_(-1)
    assert float(task.loss(task.prepare(BatchKey(0, 0)), BatchKey(0, 0))["reading"].max()) > 1e-3
    task.export(task.module, tmp_path / "after")
    after = opensora.load_pipeline(tmp_path / "after")
    assert torch.equal(after.text_encoder.get_input_embeddings().weight, task.encoder.get_input_embeddings().weight)


def test_a_model_of_before_the_language_grew_keeps_its_words(tmp_path):
    english = [word for word in VOCABULARY if language_of(word) == "en"]
    assert list(VOCABULARY[: len(english)]) == english, "Chinese comes last, so English words keep their numbers"
    first = build_trained_encoder(TrainedText(ENCODER), None, 3 + len(english), "cpu")
    first.save_pretrained(tmp_path)
    grown = build_trained_encoder(TrainedText(), str(tmp_path), 3 + len(VOCABULARY), "cpu")
    rows = grown.get_input_embeddings().weight
    assert len(rows) == 3 + len(VOCABULARY)
    assert torch.equal(rows[: 3 + len(english)], first.get_input_embeddings().weight)
