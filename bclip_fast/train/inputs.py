"""The input of a run: dataset, sampler and loader."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import numpy as np
import torch

from bclip_fast import distributed
from bclip_fast.data.caption_lengths import caption_lengths
from bclip_fast.data.loader import Loader
from bclip_fast.data.long_texts import LongTexts
from bclip_fast.data.sampler import ShardSampler
from bclip_fast.data.shards import mixed
from bclip_fast.data.shards.mixed import Dataset, MixedDataset
from bclip_fast.data.shards.positives import group_ids
from bclip_fast.data.texts import TextChoice
from bclip_fast.data.transform import Preprocess
from bclip_fast.errors import UserError
from bclip_fast.model.tokenizer import Tokenizer

from .config import DataConfig, TrainConfig
from .init_weights import initial_tokenizer
from .run_folder import RunFolder

log = logging.getLogger(__name__)


def open_dataset(config: DataConfig) -> Dataset:
    """The training split of all datasets.

    Raises:
        UserError: no shards are configured, they cannot be read, or no sample has a text of a weighted kind.
    """
    if not config.shards:
        raise UserError("data.shards is not set; set it to the folder that `bclip ingest build` wrote")
    dataset = mixed.open_dataset(config.shards, config.split, config.read, config.filter)
    config.captions.check(dataset)
    return dataset


def build_sampler(config: TrainConfig, dataset: Dataset) -> ShardSampler:
    """The sampler of this rank."""
    texts = TextChoice(config.data.captions, config.seed)
    return ShardSampler(
        dataset.shard_sizes,
        dataset.fingerprint,
        batch_size=config.batch_size,
        schedule=config.batch_schedule,
        micro_batch_size=config.micro_batch_size,
        token_budget=config.micro_batch_tokens,
        seed=config.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        shuffle_block=config.data.shuffle_block,
        # The cost of a sample is its number of tokens. An English token has 4 to 5 bytes.
        cost=lambda number, i: min(texts.num_bytes(number, i, dataset), 5 * config.model.text.context_length),
        mixture=dataset.mixture if isinstance(dataset, MixedDataset) else None,
    )


def count_tokens(config: TrainConfig, dataset: Dataset, tokenizer: Tokenizer, sampler: ShardSampler) -> None:
    """Give the sampler the tokens of every sample, if the run limits those of a micro-batch. Collective.

    Raises:
        UserError: on every rank, if the captions cannot be read from the dataset's manifest.
    """
    if not config.micro_batch_tokens:
        return
    lengths, problem, start = np.empty(0, np.int32), "", time.perf_counter()
    try:
        share, kinds = (distributed.rank(), distributed.world_size()), config.data.captions.kinds
        lengths = caption_lengths(dataset, tokenizer.encode, share, kinds)
    except UserError as error:
        problem = str(error)
    if problems := [text for text in distributed.all_gather_object(problem) if text]:
        raise UserError(problems[0])
    lengths = distributed.totals(torch.from_numpy(lengths)).numpy()
    log.info("counted the tokens of %d captions in %.1f s", len(lengths), time.perf_counter() - start)
    sampler.count_tokens(config.image_tokens, lambda epoch, index: int(lengths[index]))


def tokenizer_of_run(folder: RunFolder, config: TrainConfig, dataset: Dataset) -> Tokenizer:
    """The tokenizer of the run, the same on all ranks. Writes nothing. Collective.

    Raises:
        UserError: on every rank, if the tokenizer cannot be read or does not fit the model.
    """
    return distributed.run_on_rank0(lambda: _tokenizer(folder, config, dataset))


def _tokenizer(folder: RunFolder, config: TrainConfig, dataset: Dataset) -> Tokenizer:
    source, text, has_decoder = config.data.tokenizer, config.model.text, config.model.decoder.layers > 0
    if folder.records is not None:
        tokenizer = folder.read_tokenizer(text.context_length)
    elif not source and (initial := initial_tokenizer(config)) is not None:
        tokenizer = initial
    elif source in ("", "train"):
        tokenizer = Tokenizer.train(dataset.captions(config.data.captions.kinds), text.vocab_size, text.context_length)
    else:
        tokenizer = Tokenizer.from_file(source, text.context_length)
    if tokenizer.vocab_size > text.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but model.text.vocab_size={text.vocab_size}; raise it"
        )
    if text.kind != "siglip" and not tokenizer.has_start:
        raise UserError(
            f"the tokenizer adds no start token, which model.text.kind={text.kind} needs; choose another data.tokenizer"
        )
    if (text.kind != "gpt" or has_decoder) and tokenizer.pad_id != text.pad_id:
        raise UserError(
            f"the tokenizer's padding token is {tokenizer.pad_id}; set model.text.pad_id={tokenizer.pad_id}"
        )
    end = int(tokenizer("", 2)[0, -1])
    # The text tower of a model with a decoder reads its class token.
    if (
        text.kind == "gpt"
        and not has_decoder
        and end != (tokenizer.vocab_size - 1 if text.end_id is None else text.end_id)
    ):
        raise UserError(f"the tokenizer ends captions with token {end}; set model.text.end_id={end}")
    return tokenizer


def long_texts(tokenizer: Tokenizer) -> LongTexts:
    """Divides texts by the tokens of `tokenizer`, at its context length."""
    return LongTexts(
        lambda texts: list(map(len, tokenizer.encode(texts, sys.maxsize))), max_tokens=tokenizer.context_length
    )


def build_loader(
    config: DataConfig,
    dataset: Dataset,
    sampler: ShardSampler,
    tokenizer: Tokenizer,
    preprocess: Preprocess,
    device: torch.device,
    **teacher: Any,
) -> Loader:
    """The loader that `config.loader` names. `teacher`: the loader's keywords for a loss with a teacher."""
    arguments = (dataset, tokenizer.encode, sampler, preprocess)
    options: dict[str, Any] = {
        "augment": config.augment,
        "crop_scale": config.crop_scale,
        "num_threads": config.num_threads,
        "prefetch_batches": config.prefetch_batches,
        "pin_memory": device.type == "cuda",
        "timeout_s": config.timeout_s,
        "groups": group_ids(dataset, config.positives, config.captions.kinds),
        "captions": config.captions,
        "long_texts": None if config.long_texts == "cut" else long_texts(tokenizer),
        **teacher,
    }
    if config.loader == "native":
        return Loader(*arguments, **options)
    from bclip_fast.data.dali_loader import DaliLoader

    return DaliLoader(*arguments, device_id=device.index if device.type == "cuda" else None, **options)
