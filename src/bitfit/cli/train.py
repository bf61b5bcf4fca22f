"""``bitfit train``."""

from __future__ import annotations

from bitfit.cli import console, options


def train(
    data: options.Data,
    base: options.Base = "minilm",
    task: options.Task = None,
    text: options.TextColumn = None,
    text_pair: options.PairColumn = None,
    label: options.LabelColumn = None,
    labels: options.Labels = None,
    kind: options.Kind = None,
    train_split: options.TrainSplit = "train",
    dev: options.Dev = None,
    test: options.Test = None,
    format: options.DataFormat = "auto",
    token_column: options.TokenColumn = None,
    label_separator: options.LabelSeparator = None,
    hub_revision: options.HubRevision = None,
    limit: options.Limit = None,
    dev_fraction: options.DevFraction = 0.1,
    data_seed: options.DataSeed = None,
    skip_bad_rows: options.SkipBadRows = False,
    out: options.Out = None,
    name: options.Name = None,
    storage: options.Storage = "fp32",
    licence: options.Licence = None,
    description: options.Description = None,
    learning_rate: options.LearningRate = None,
    recipe: options.Recipe = "default",
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = None,
    seed: options.Seed = 0,
    terms: options.Terms = None,
    method: options.Method = None,
    max_length: options.MaxLength = None,
    pooling: options.Pooling = None,
    schedule: options.Schedule = None,
    warmup_ratio: options.WarmupRatio = None,
    max_grad_norm: options.MaxGradNorm = None,
    adam_eps: options.AdamEps = None,
    attention_dropout: options.AttentionDropout = None,
    class_weights: options.ClassWeights = None,
    keep: options.Keep = None,
    patience: options.Patience = None,
    train_score: options.TrainScore = False,
    resume: options.Resume = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    lanes: options.Lanes = "auto",
    low_memory: options.LowMemory = False,
    dry_run: options.DryRun = False,
    log: options.Log = None,
    tensorboard: options.TensorBoard = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Fine-tune a base on a task and write a task file.

    Only bias vectors and a small head are trained (BitFit, Ben Zaken et al. 2022). Ctrl-C saves
    the state; the same command with --resume goes on from there.
    """
    given = dict(locals())  # every option, under the name that bitfit.finetune has for it
    from bitfit.cli import showing_run, training

    if dry_run:
        plan = training.plan(given)
        if not console.is_main():
            return None
        return console.print_json(plan) if as_json else showing_run.show_plan(plan)
    outcome = training.run(given)
    if not console.is_main():
        return None
    if as_json:
        console.print_json(outcome.to_json())
    else:
        showing_run.show_outcome(outcome)
    return None
