"""Prompts as ids for the stages that sample, and a report of what was left out; imports inputs and data_reports."""

from __future__ import annotations

import dataclasses

from rlhf_jax.data import batches
from rlhf_jax.stages import data_reports, inputs
from rlhf_jax.stages.handoffs import Model, check_context
from rlhf_jax.stages.run_directory import Run, write_data_report


def encode_prompts(
    run: Run, data: inputs.DataConfig, model: Model, *, num_eval_prompts: int, responses_per_prompt: int
) -> tuple[batches.Encoded, batches.Encoded]:
    """Training prompts, and held-out ones repeated for as many responses each; what was left out is kept on file.

    Raises:
      InputError: a prompt that cannot be used, or widths beyond the model's context.
      Interrupted: stopped on request while a prepared set was scanned.
    """
    check_context(model, data.prompt_length + data.response_length)
    split = inputs.load_prompts(data)
    with data_reports.shown_scan(run) as progress:
        train, report = batches.encode_prompts(
            split.train,
            model.tokenizer,
            prompt_length=data.prompt_length,
            truncation=data.truncation,
            progress=progress,
        )
    held_out, held_out_report = _encode_held_out(data, model, split, num_eval_prompts)
    report = dataclasses.replace(report, repeated=split.repeated[0])
    write_data_report(run, split.left_out, train=report, held_out=held_out_report)
    return train, in_rounds(held_out, responses_per_prompt)


def encode_held_out_prompts(run: Run, data: inputs.DataConfig, model: Model, count: int) -> batches.Encoded:
    """So many held-out prompts, or as many as there are, in memory; what was left out is kept on file.

    Raises:
      InputError: a prompt that cannot be used.
    """
    split = inputs.load_prompts(data)
    encoded, report = _encode_held_out(data, model, split, count)
    write_data_report(run, split.left_out, prompts=report)
    return encoded


def in_rounds(encoded: batches.Encoded, count: int) -> batches.Encoded:
    """The rows, which are in memory, again and again: response j to prompt i of P is at row j * P + i.

    Whole rounds, so that the first responses are to different prompts; a row's noise depends on its place, so a
    prompt's responses differ.
    """
    return dataclasses.replace(encoded, rows=encoded.rows * count)


def _encode_held_out(
    data: inputs.DataConfig, model: Model, split: inputs.Split, count: int
) -> tuple[batches.Encoded, batches.EncodeReport]:
    encoded, report = batches.encode_prompts(
        split.first_held_out(count),
        model.tokenizer,
        prompt_length=data.prompt_length,
        truncation=data.truncation,
    )
    return encoded, dataclasses.replace(report, repeated=split.repeated[1])
