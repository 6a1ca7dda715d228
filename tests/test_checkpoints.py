"""What comes with the package stays small."""

from lego_pipeline.checkpoints import KITCHEN


def test_the_embedded_checkpoint_has_at_most_48_mib() -> None:
    assert (KITCHEN / "model_index.json").is_file()
    assert sum(path.stat().st_size for path in KITCHEN.rglob("*") if path.is_file()) <= 48 << 20
