"""The averages of timm, ultralytics and Lightning, as these libraries are."""

import copy

import pytest
import torch
from torch.optim.swa_utils import get_ema_avg_fn

import prunekernels as pk
from cases.averages import masked_net
from nn.test_ema import AVERAGED, X, assert_means_the_same_when_plain, assert_same_masks, prune, step


def train_with(average, network, net, update, followers):
    """Three epochs of GHFP with an average; its masks are those of the network at every update."""
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9, weight_decay=0.01)
    method = pk.methods.GHFP(
        net, optimizer, rate=0.5, epochs=3, duty=0.5, steps_per_epoch=4, example_input=X, followers=followers
    )
    for epoch in range(3):
        for i in range(4):
            step(net, optimizer, 4 * epoch + i)
            method.step()
            update(net)
        method.end_epoch()
    assert_same_masks(net, network(average))
    update(net)
    assert_means_the_same_when_plain(network(average))


@pytest.mark.parametrize("name", ["ModelEma", "ModelEmaV2", "ModelEmaV3"])
@pytest.mark.parametrize("follows", [True, False])
def test_timm_ema(name, follows):
    timm = pytest.importorskip("timm.utils.model_ema")
    net = masked_net()
    average = getattr(timm, name)(net, decay=0.9)
    network = lambda ema: ema.ema if name == "ModelEma" else ema.module  # noqa: E731
    if follows:
        train_with(average, network, net, average.update, [average])
        return
    average.update(net)
    prune(net)
    average.update(net)
    with pytest.raises(ValueError, match=AVERAGED):
        network(average)(X)
    with pytest.raises(ValueError, match=AVERAGED):
        average.update(net)
    pk.copy_masks(net, average)
    average.update(net)
    assert_same_masks(net, network(average))
    assert_means_the_same_when_plain(network(average))


@pytest.mark.parametrize("follows", [True, False])
def test_ultralytics_ema(follows):
    utils = pytest.importorskip("ultralytics.utils.torch_utils")
    net = masked_net()
    average = utils.ModelEMA(net, decay=0.9, tau=1)
    if follows:
        train_with(average, lambda ema: ema.ema, net, average.update, [average])
        return
    average.update(net)
    prune(net)
    average.update(net)
    with pytest.raises(ValueError, match=AVERAGED):
        average.ema(X)
    pk.copy_masks(net, average)
    average.update(net)
    assert_same_masks(net, average.ema)
    assert_means_the_same_when_plain(average.ema)


def lit_module(lightning, net, followers, duty):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _):
            return self(batch[0]).square().mean()

        def validation_step(self, batch, _):
            self(batch[0])

        def configure_optimizers(self):
            self.optimizer = torch.optim.SGD(self.parameters(), 0.05)
            return self.optimizer

        def on_fit_start(self):
            self.method = pk.methods.ASFP(
                self, self.optimizer, rate=0.5, epochs=3, duty=duty, clip=False, followers=followers
            )

        def on_before_zero_grad(self, *_):
            self.method.step()

        def on_train_epoch_end(self):
            self.method.end_epoch()

    return Module()


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "WeightAveraging of an EMA", "WeightAveraging"])
@pytest.mark.parametrize("follows", [True, False])
@pytest.mark.parametrize("duty", [0.0, 1.0], ids=["masks from the start", "masks at the end"])
@pytest.mark.filterwarnings("ignore:.*(num_workers|ModelCheckpoint|LeafSpec|isinstance)")
def test_lightning_ema(name, follows, duty, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
    norms = name != "WeightAveraging"  # the equal-weight average of torch refuses the counter of a batch norm
    net = masked_net(norms=norms)
    if name == "EMAWeightAveraging":
        callback = callbacks.EMAWeightAveraging(decay=0.9)
    else:
        callback = callbacks.WeightAveraging(**({"avg_fn": get_ema_avg_fn(0.9)} if norms else {}))
    module = lit_module(lightning, net, [callback] if follows else [], duty)
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.cat([X, X * 2, X - 1])), batch_size=4, num_workers=0
    )
    trainer = lightning.Trainer(
        max_epochs=3, callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip
    if not follows and duty == 0:
        with pytest.raises(ValueError, match=AVERAGED):
            trainer.fit(module, data, data)
        return
    if not follows:  # what is left is the average from before the last change of masks
        with pytest.warns(UserWarning, match=r"masks of a network were replaced.*followers"):
            trainer.fit(module, data, data)
            net.eval()(X)
        assert net[0].filter_mask.all()
        return
    trainer.fit(module, data, data)
    dead = [int((~layer.filter_mask).sum()) for layer in net if isinstance(layer, pk.MaskedConv2d)]
    assert dead == [4, 3, 2]
    assert_means_the_same_when_plain(net)


def test_ultralytics_checkpoint_of_an_ema(tmp_path):
    """What ultralytics' trainer saves: the EMA in half precision, as a pickled module."""
    ultralytics = pytest.importorskip("ultralytics")
    utils = pytest.importorskip("ultralytics.utils.torch_utils")
    model = ultralytics.YOLO("yolov8n.yaml").model
    pk.convert(model)
    average = utils.ModelEMA(model, decay=0.9, tau=1)
    average.update(model)
    for layer in model.modules():
        if isinstance(layer, pk.MaskedConv2d) and layer.out_channels % 16 == 0:
            layer.set_masks(filter=torch.arange(layer.out_channels) % 2 == 0)
    with pytest.raises(ValueError, match=AVERAGED):
        average.update(model)
        copy.deepcopy(average.ema)
    pk.copy_masks(model, average)
    average.update(model)
    torch.save({"ema": copy.deepcopy(average.ema).half()}, tmp_path / "last.pt")
    loaded = torch.load(tmp_path / "last.pt", weights_only=False)["ema"].float().eval()
    assert_same_masks(model, loaded)
    x = torch.rand(1, 3, 64, 64)
    before, after = average.ema.eval()(x)[0], loaded(x)[0]
    torch.testing.assert_close(after, before, rtol=0.1, atol=0.5)
    dead = sum(int((~layer.filter_mask).sum()) for layer in loaded.modules() if isinstance(layer, pk.MaskedConv2d))
    assert dead > 1000
