"""A scalar reward model from preferences or rankings (Bradley-Terry), started from SFT. A stage; imports all below.

Loss: -log sigmoid(r(x, y_w) - r(x, y_l) - margin), of pairs by themselves, of all pairs of a ranking (Ouyang et al.
2022, equation 1), or the likelihood of the whole ranking: see `reward_objectives`. The head starts at N(0, 1/(d+1))
and is read at the last token. After training the mean reward of chosen training responses, or of those ranked first, is
stored as an offset, so that a score of 0 means "as good as those" (Huang et al. 2024).

An ensemble is trained as one model whose parameters have a leading axis: each member has a head of its own and sees its
own pairs in its own order (Coste et al. 2024). A model of several objectives has one trunk, and a head for each that
learns from labels of its own (`reward_forms`).
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping

import jax

from rlhf_jax.data import batches, rankings
from rlhf_jax.data.rows import Preference
from rlhf_jax.errors import InputError, check_range
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from rlhf_jax.stages import adapters, inputs, reward_forms, reward_measures, reward_objectives
from rlhf_jax.stages.handoffs import check_same_family, leave_handoff, load_start
from rlhf_jax.stages.run_directory import Purpose, inputs_of, open_run, runs_of
from rlhf_jax.stages.supervised import encode_split, train
from rlhf_jax.training.interrupt import StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig

# The first so many training rows: the mean reward of their chosen responses becomes the offset.
NUM_REFERENCE_RESPONSES = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One reward-model run.

    kind: "pairs"; "all_pairs", every pair of a prompt's ranked responses in one row, averaged per prompt;
    "plackett_luce", the likelihood of the whole ranking. The latter two take rankings, of up to ``data.ranking_size``
    responses, and are judged by held-out pairs. members: reward models trained side by side, each on ``batch_size``
    pairs or rankings a step of its own. Gradients are clipped together. lora: whether an adapter and the head are
    trained. margin, label_smoothing, centering: of "pairs", see ``losses.bradley_terry_loss``.
    length_penalty: what the squared correlation of rewards with lengths, among responses to one prompt, is multiplied
    by; see ``losses.length_penalty_loss``. Such a step has a second forward pass. batches: how rows become batches.
    objectives: names of labels that rows have ("preferred" and "brief" of the embedded reviews), each of which gets a
    head of its own on one trunk; none: one head, for ``chosen`` against ``rejected``.
    """

    seed: int = 0
    data: inputs.DataConfig = dataclasses.field(default_factory=inputs.DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: Schedule = dataclasses.field(default_factory=lambda: Schedule(num_steps=300))
    batch_size: int = 64
    num_microbatches: int = 1
    batches: inputs.BatchConfig = dataclasses.field(default_factory=inputs.BatchConfig)
    members: int = 1
    lora: adapters.LoraOptions = dataclasses.field(default_factory=adapters.LoraOptions)
    margin: float = 0.0
    label_smoothing: float = 0.0
    centering: float = 0.0
    kind: reward_objectives.Kind = "pairs"
    length_penalty: float = 0.0
    objectives: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_range(self, "batch_size", "num_microbatches", "members", at_least=1)
        if self.members > 1 and self.lora.rank:
            raise InputError(
                f"lora.rank is {self.lora.rank} and members is {self.members}: adapters are of one model; give rank 0, "
                "or members=1"
            )
        if self.members > 1 and self.optimizer.weight_decay:
            raise InputError(
                f"config.optimizer.weight_decay is {self.optimizer.weight_decay}, which would decay the norm scales of "
                "an ensemble too; give 0, or members=1"
            )
        check_range(self, "label_smoothing", at_least=0, below=0.5)
        check_range(self, "centering", "length_penalty", at_least=0)
        for name in ("margin", "label_smoothing", "centering"):
            if self.kind != "pairs" and getattr(self, name):
                raise InputError(
                    f"config.{name} is {getattr(self, name)}, which is of pairs; give 0, or kind=pairs in the place of "
                    f"{self.kind}"
                )
        if self.kind == "plackett_luce" and self.data.soft_labels:
            raise InputError(
                "config.data.soft_labels is on, and kind=plackett_luce learns one order of the responses; turn it off, "
                "or give kind=all_pairs"
            )
        if self.objectives:
            self._check_objectives()

    def _check_objectives(self) -> None:
        if len(set(self.objectives)) < len(self.objectives):
            raise InputError(
                f"config.objectives is {self.objectives}, which has a name twice; give each once"
            )
        for name in self.objectives:
            # Names of heads stand behind directories and commas on a command line, and in names of metrics.
            if not name or set(name) & set(":,/") or name.split() != [name]:
                raise InputError(
                    f"config.objectives has {name!r}, which no command line could name: give labels without colon, "
                    "comma, slash or blank"
                )
        of_one_head = {
            "kind": self.kind != "pairs",
            "members": self.members > 1,
            "length_penalty": self.length_penalty,
            "data.soft_labels": self.data.soft_labels,
            # All heads are one array of rank 2, which would decay where a single head does not.
            "optimizer.weight_decay": self.optimizer.weight_decay,
        }
        for name in (name for name, is_given in of_one_head.items() if is_given):
            raise InputError(
                f"config.objectives is {self.objectives}, and config.{name} is of reward models with one head; leave "
                "it at its default, or leave the objectives out"
            )

    def form(self, model: ModelConfig) -> reward_forms.Form:
        """What the stage trains."""
        how = {"margin": self.margin, "label_smoothing": self.label_smoothing, "centering": self.centering}
        if self.objectives:
            return reward_forms.of_objectives(model, self.objectives, how)
        how |= {"kind": self.kind, "length_penalty": self.length_penalty}
        if self.members > 1:
            return reward_forms.ensemble(model, self.members, how)
        return reward_forms.one(model, how)


def run(
    config: Config,
    workdir: str | os.PathLike,
    *,
    init_from: str,
    parallelism: meshes.Parallelism = "jit",
    mesh: jax.sharding.Mesh | None = None,
    stop: StopRequest,
) -> None:
    """Runs the stage to its hand-off; returns at once if it is there.

    ``init_from``: a finished run, or a Hugging Face directory; of an ensemble as many as it has members, with commas
    between them, give each a trunk of its own (Eisenstein et al. 2023).

    Raises:
      InputError: anything the user gave that cannot be used, before any training.
      Interrupted: stopped on request, after saving.
    """
    origins = runs_of(init_from, flag="init_from")
    run_ = open_run(
        workdir,
        "reward_model",
        config,
        inputs=inputs_of("init_from", origins),
        parallelism=parallelism,
        mesh=mesh,
        stop=stop,
    )
    if run_.finished:
        return
    if len(origins) not in (1, config.members):
        raise InputError(
            f"--init_from names {len(origins)} trunks, and config.members is {config.members}; give one trunk, or one "
            "for each member"
        )
    model, *others = [load_start(origin, run_) for origin in origins]
    for other in others:
        check_same_family(model, other, architecture=True)
    is_ranked, encode = config.kind != "pairs", batches.encode_preferences
    if is_ranked:
        split = inputs.load_rankings(config.data)
        encode = functools.partial(batches.encode_rankings, ranking_size=config.data.ranking_size)
    else:
        split = inputs.load_preferences(config.data, config.objectives)
    train_rows, held_out = encode_split(
        run_, config.data, model, split, encode, encode_held_out=batches.encode_preferences
    )

    reference = _reference(config, train_rows, held_out, stop)
    form = config.form(model.config)
    decoders = [start.params["decoder"] for start in (model, *others)]
    params = form.init(decoders, run_.key(config.seed, Purpose.INIT))
    params = meshes.put(params, sharding.parameter_sharding(run_.mesh, model.config, params))
    of = {"batch_size": config.batch_size, "run": run_, "score_rows": form.score}
    score_held_out = reward_measures.make_pair_scorer(model.config, held_out, **of)
    # What is measured on the way needs to know the rows where each head has its own side of them.
    sides = rows_of(held_out) if config.objectives else ()

    def evaluate(params) -> Mapping[str, float]:
        return reward_measures.measure(form.views(score_held_out(params), sides))

    trained = train(
        run_,
        config,
        model=model.config,
        objective=form.objective,
        params=params,
        frozen={},
        iterator=inputs.preference_batches(
            config.batches,
            train_rows,
            batch_size=config.batch_size * config.members,
            seed=run_.data_seed(config.seed),
        ),
        evaluate=evaluate,
        shown=("loss", *form.shown),
        prepare=reward_objectives.make_length_moments(model.config, config.members)
        if config.length_penalty
        else None,
    )
    score_reference = reward_measures.make_pair_scorer(model.config, reference, **of)
    facts = form.zero(score_reference(trained.params), rows_of(reference))
    scores = score_held_out(trained.params)
    views = form.views(scores, rows_of(held_out))
    facts |= form.more(scores, facts) | reward_measures.measure(views) | reward_measures.compare(views)
    reward_measures.write_margins(views[0], run_)
    leave_handoff(run_, config, model, trained, made_from=origins, facts=facts)


def rows_of(encoded: batches.Encoded) -> list[Preference]:
    """The rows that encoded pairs were made from."""
    return [pair.row for pair in encoded.rows]


def _reference(
    config: Config, train_rows: batches.Encoded, held_out: batches.Encoded, stop: StopRequest
) -> batches.Encoded:
    """The pairs whose better responses are where rewards have their zero.

    Raises:
      InputError: an objective that decides none of them, or no held-out pair.
      Interrupted: stopped on request.
    """
    if config.kind != "pairs":
        return rankings.best_and_worst(train_rows, NUM_REFERENCE_RESPONSES)
    if config.objectives:
        first = functools.partial(reward_forms.first_decided, config.objectives, stop=stop)
        first(held_out.rows, 1, which="held out")
        rows = first(train_rows.rows, NUM_REFERENCE_RESPONSES, which="to train on")
    else:
        rows = train_rows.rows[:NUM_REFERENCE_RESPONSES]
    return dataclasses.replace(train_rows, rows=rows)
