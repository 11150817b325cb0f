"""Which tests are a module's own: those that have to notice a fault in it."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("engine", "loaders", "bench", "jobs")
OWN = {
    # of a module: tests besides tests/ROOM/test_MODULE.py; of a room: of its modules that have neither
    "bench/measured": ["bench/measured/test_scaling.py", "bench/test_scaling.py"],
    "bench/measured/adamw.py": ["bench/test_kernel.py"],
    "bench/measured/compared.py": ["bench/test_train_step.py"],
    "bench/measured/kernel.py": ["bench/test_kernel.py"],
    "bench/disturbed/lagging.py": ["bench/test_lagging.py"],
    "bench/disturbed/supervised.py": ["bench/test_chaos.py"],
    "bench/measured/norm.py": ["bench/test_kernel.py"],
    "bench/measured/pack_index.py": ["bench/test_loader.py"],
    "bench/measured/step.py": ["bench/test_train_step.py"],
    "bench/measured/training.py": ["bench/test_train_step.py"],
    "bench/peers/steps.py": ["bench/test_train_step.py"],
    "bench/peers/turns.py": ["bench/test_loader.py"],
    "bench/measured/steps.py": ["bench/measured/test_scaling.py"],
    "bench/model/report.py": ["bench/model/test_scaling.py", "bench/test_scaling.py"],
    "bench/model": ["bench/model/test_scaling.py", "bench/test_scaling.py"],
    "bench/pack_index.py": ["bench/test_loader.py"],
    "bench/paper": ["bench/paper/test_figures.py", "bench/paper/test_report.py"],
    "bench/peers/loaders.py": ["bench/test_loader.py"],
    "bench/peers": ["bench/test_loader.py"],
    "bench/report.py": ["bench/paper/test_report.py"],
    "engine/cli.py": ["engine/test_pretrain.py", "engine/config/test_loading.py"],
    "engine/comm": ["engine/comm/test_choose.py", "engine/comm/test_device.py", "engine/comm/test_ranks.py"],
    "engine/compiled.py": ["engine/optim/test_ops.py", "bench/test_kernel.py"],
    "engine/config": ["engine/config/test_loading.py", "engine/config/test_published.py"],
    "engine/exporting": ["engine/exporting/test_writing.py", "engine/exporting/test_card.py"],
    "engine/evaluating": ["engine/evaluating/test_report.py", "engine/test_evaluate.py"],
    "engine/network/bit.py": ["engine/network/test_norm.py", "engine/network/test_recompute.py"],
    "engine/network/conversion.py": ["engine/test_convert.py"],
    "engine/network/family.py": ["engine/network/test_bit.py"],
    "engine/network/formats.py": ["engine/network/test_weights.py", "engine/test_convert.py"],
    "engine/network/matching.py": ["engine/network/test_weights.py"],
    "engine/network/naming.py": ["engine/network/test_weights.py", "engine/test_convert.py"],
    "engine/network/states.py": ["engine/network/test_weights.py"],
    "engine/optim/agc.py": ["engine/optim/test_agc_sgd.py", "engine/optim/test_agc_adamw.py"],
    "engine/optim/clipping.py": ["engine/optim/test_clipping.py", "engine/optim/test_agc_sgd.py"],
    "engine/optim/plan.py": ["engine/optim/test_fused.py", "engine/optim/test_agc_adamw.py"],
    "engine/optim/span.py": ["engine/optim/test_fused.py"],
    "engine/predicting": ["engine/predicting/test_table.py"],
    "engine/page": ["engine/page/test_page.py"],
    "engine/saving/places.py": ["engine/saving/test_checkpoint.py"],
    "engine/predicting/images.py": ["engine/test_predict.py"],
    "engine/predicting/run.py": ["engine/test_predict.py"],
    "engine/training": ["engine/training/test_trainer.py", "engine/test_pretrain.py", "engine/test_finetune.py"],
    "engine/training/hooks.py": ["engine/saving/test_full_disk.py", "engine/test_pretrain.py"],
    "engine/training/objective.py": ["engine/training/test_losses.py", "engine/training/test_evaluate.py"],
    "engine/training/precision.py": ["engine/training/test_trainer.py", "engine/test_pretrain.py"],
    "engine/training/run.py": ["engine/test_pretrain.py", "engine/test_finetune.py"],
    "engine/training/timetable.py": ["engine/training/test_schedule.py", "engine/config/test_published.py"],
    "engine/transfer": ["engine/test_finetune.py"],
    "engine/transfer/plan.py": ["engine/test_finetune.py"],
    "engine/transfer/record.py": ["engine/saving/test_full_disk.py", "engine/transfer/test_results.py"],
    "engine/transfer/sweep_file.py": ["engine/test_sweep.py"],
    "engine/weights.py": ["engine/test_convert.py"],
    "engine/whole.py": ["engine/saving/test_checkpoint.py", "bench/paper/test_report.py"],
    "loaders/errors.py": ["loaders/test_pack.py"],
    "loaders/packing": ["loaders/packing/test_spreading.py", "loaders/test_pack.py"],
    "loaders/packs/shard.py": ["loaders/packs/test_superset.py"],
    "loaders/packs/mapped.py": ["loaders/packs/test_shard.py", "loaders/pipelines/test_files.py"],
    "loaders/packs/index.py": ["loaders/packs/test_shard.py"],
    "loaders/packs": ["loaders/packs/test_shard.py", "loaders/packs/test_index.py", "loaders/test_pack.py"],
    "loaders/pipelines": ["loaders/pipelines/test_batches.py", "loaders/pipelines/test_transform.py"],
    "loaders/pipelines/sheet.py": ["loaders/test_view.py"],
    "loaders/sources": ["loaders/sources/test_sources.py", "loaders/sources/test_folders.py", "loaders/test_pack.py"],
    "loaders/sources/images.py": ["loaders/sources/test_gray16.py", "loaders/test_pack.py"],
    "loaders/sources/kinds": ["loaders/sources/test_sources.py", "loaders/sources/test_links.py"],
    "loaders/packs/hdf5.py": ["loaders/packs/test_shard.py", "fuzz/test_unbounded.py"],
    "loaders/pipelines/dali.py": ["loaders/pipelines/test_as_published.py", "loaders/pipelines/test_batches.py"],
    "loaders/pipelines/finish.py": ["loaders/pipelines/test_as_published.py"],
    "loaders/sources/folders.py": ["loaders/sources/test_sources.py", "loaders/test_pack.py"],
    "loaders/sources/kinds/digits.py": ["loaders/test_pack.py", "loaders/sources/test_sources.py"],
    "loaders/sources/listing.py": ["loaders/sources/test_sources.py", "loaders/test_pack.py"],
    "loaders/sources/select.py": ["loaders/test_pack.py"],
    "loaders/sources/wire/mat.py": ["loaders/sources/test_mat.py"],
    "loaders/sources/wire/lmdb_file.py": ["loaders/sources/test_lmdb.py"],
    "loaders/sources/kinds/csv.py": ["loaders/sources/test_sources.py", "loaders/sources/test_unlabelled.py"],
    "loaders/sources/kinds/files.py": ["loaders/sources/test_unlabelled.py"],
    "loaders/sources/kinds/dicom": ["loaders/sources/dicom/test_values.py", "loaders/sources/dicom/test_source.py"],
    "loaders/sources/kinds/lmdb.py": ["loaders/sources/test_lmdb.py"],
    "loaders/sources/kinds/tfrecord.py": ["loaders/sources/test_tfrecord.py"],
    "loaders/sources/kinds/xray": ["loaders/sources/xray/test_labels.py", "loaders/sources/xray/test_splits.py"],
    "loaders/sources/wire": ["loaders/sources/test_tfrecord.py", "loaders/sources/test_lmdb.py"],
}  # fmt: skip


def modules() -> list[str]:
    """Paths from the root of all modules that faults are planted in."""
    found = (path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    return sorted(str(path) for path in found if path.name != "__init__.py")


def tests_of(module: str) -> list[str]:
    """Paths from the root of a module's tests: the file of its name and what OWN says of it, else OWN of its room."""
    path = Path(module)
    named = f"{path.parent}/test_{path.name}"
    found = [named] if (ROOT / "tests" / named).exists() else []
    found += [test for test in OWN.get(module, []) if test != named]
    for room in () if found else path.parents:
        if found := OWN.get(str(room), []):
            break
    if not found:
        raise LookupError(f"{module} has no tests/{named}, and OWN in {__file__} names no others")
    return [f"tests/{test}" for test in found]
