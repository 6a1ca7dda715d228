"""The model that is validated; what its loss and pictures are is shown in tests/train/test_train_ldm.py."""

import torch
from diffusers.training_utils import EMAModel

from lego_pipeline.validation import averaged


def test_the_averaged_model_has_no_dropout_and_goes_back_to_training() -> None:
    linear = torch.nn.Linear(2, 2)
    model = torch.nn.Sequential(linear, torch.nn.Dropout(0.5)).train()
    ema = EMAModel(model.parameters(), decay=0.5)
    trained, average = linear.weight.detach() + 1, linear.weight.detach().clone()
    linear.weight.data = trained.clone()
    with averaged(ema, list(model.parameters()), model):
        assert not any(module.training for module in model.modules())
        assert torch.equal(linear.weight, average)
    assert all(module.training for module in model.modules())
    assert torch.equal(linear.weight, trained)
