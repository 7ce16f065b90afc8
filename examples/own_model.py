# %% [markdown]
# # Shared filter bases in a Flax model of your own
#
# A small convolutional network in Flax, on scikit-learn's handwritten digits, in four steps:
#
# 1. its 3×3 layers **share one filter basis**: each filter is a linear combination of the elements of the basis;
# 2. an **orthogonality penalty** keeps the elements from becoming alike while it trains;
# 3. the **basis** is drawn;
# 4. a network that was trained **without** a basis is **compressed** into one with a basis, and fine-tuned.
#
# It takes about a minute on two CPU cores; no accelerator is needed.
#
# The method: Kang & Kim, *Deeply Shared Filter Bases for Parameter-Efficient Convolutional Neural Networks*,
# NeurIPS 2021.

# %% [markdown]
# ## Install
#
# On Colab, or wherever `shared_basis` is not installed yet, set `SOURCE` to the address of the repository, as for
# `git clone`, with `git+` before it: `"git+https://HOST/OWNER/NAME"`; or to the directory of a clone.

# %%
import importlib.util
import subprocess
import sys

SOURCE = ""

if importlib.util.find_spec("shared_basis") is None:
    if not SOURCE:
        raise SystemExit("shared_basis is not installed: set SOURCE above to the address of its repository")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", SOURCE], check=True)

# %%
import io

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

from shared_basis import (
    BasisConv,
    BasisGroup,
    add_orthogonality_penalty,
    count_by_kind,
    draw_basis,
    factorize_kernels,
    init_shared_bases,
    orthogonality_diagnostics,
)

# %% [markdown]
# ## Data
#
# 1,797 digits of 8×8 pixels; the first 360 are for testing.

# %%
digits = load_digits()
images, labels = (digits.images[..., None] / 16).astype(np.float32), digits.target
train_images, train_labels = images[360:], labels[360:]
test_images, test_labels = images[:360], labels[:360]

figure, axes = plt.subplots(1, 10, figsize=(9, 1.2))
for axis, image, label in zip(axes, images, labels, strict=False):
    axis.imshow(image[..., 0], cmap="gray_r")
    axis.set_title(label)
    axis.axis("off")
plt.show()

# %% [markdown]
# ## 1. A model whose layers share a basis
#
# `Net(shared=0)` is an ordinary network: six 3×3 `nn.Conv`, each with a `BatchNorm` and a shortcut around it. With
# `shared=16` three things change:
#
# - the basis is a parameter of the *network*, `[3, 3, channels, elements]`;
# - `BasisConv` replaces `nn.Conv`, and is **called with the basis**. It holds only its coefficients, and if `unique` is
#   not 0 a few elements of its own;
# - nothing else.

# %%
WIDTH = 32
LAYERS = [f"conv{number}" for number in range(6)]


class Net(nn.Module):
    """Maps images `[N, 8, 8, 1]` to logits `[N, 10]`."""

    shared: int = 0
    unique: int = 0

    @nn.compact
    def __call__(self, x, train):
        if self.shared:
            bases = self.param("bases", init_shared_bases, {"body": (3, 3, WIDTH, self.shared)})
        x = nn.relu(nn.Conv(WIDTH, (3, 3), name="stem")(x))
        for name in LAYERS:
            self.sow("inputs", f"into_{name}", x)  # step 4 looks at what comes into each layer
            if self.shared:
                y = BasisConv(WIDTH, unique_rank=self.unique, name=name)(x, bases["body"], train=train)
            else:
                y = nn.Conv(WIDTH, (3, 3), use_bias=False, name=name)(x)
            x = x + nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"{name}_norm")(y))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def init(model):
    return jax.jit(model.init, static_argnames="train")(jax.random.key(0), images[:1], train=False)


def size_of(variables):
    return sum(count_by_kind(variables["params"]).values())


def weights(variables):
    return {name: variables[name] for name in ("params", "batch_stats")}


for model in (Net(), Net(shared=16, unique=1)):
    kinds = count_by_kind(init(model)["params"])
    print(f"{model.shared:2} shared elements: {sum(kinds.values()):,} parameters", kinds)

# %% [markdown]
# ## 2. Train, with the penalty
#
# The penalty is one link of an optax chain, before the optimizer: it adds its gradient to that of the loss. A
# `BasisGroup` names, by their paths in the parameters, the basis and the unique elements that are used with it.

# %%
GROUPS = [BasisGroup("bases/body", "conv*/unique")]
STEPS, BATCH = 300, 64


def train(model, variables, optimizer, steps):
    """Returns the trained variables, and by step the loss and the largest product of two elements of the basis."""

    @jax.jit
    def step(variables, state, images, labels):
        def loss(params):
            logits, moved = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), moved
        (value, moved), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradient, state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        coherence = orthogonality_diagnostics(params, GROUPS)["coherence"] if model.shared else 0.0
        return {**moved, "params": params}, state, value, coherence

    state, rng, losses, coherences = optimizer.init(variables["params"]), np.random.default_rng(0), [], []
    for _ in range(steps):
        chosen = rng.integers(len(train_images), size=BATCH)
        variables, state, value, coherence = step(variables, state, train_images[chosen], train_labels[chosen])
        losses.append(float(value))
        coherences.append(float(coherence))
    return variables, losses, coherences


def accuracy(model, variables):
    logits = jax.jit(model.apply, static_argnames="train")(variables, test_images, train=False)
    return 100 * float(np.mean(np.argmax(logits, -1) == test_labels))


def adam():
    return optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))


plain, shared = Net(), Net(shared=16, unique=1)
trained = {
    "plain": (plain, *train(plain, weights(init(plain)), adam(), STEPS)),
    "shared, no penalty": (shared, *train(shared, weights(init(shared)), adam(), STEPS)),
    "shared, penalty": (shared, *train(shared, weights(init(shared)),
                                       optax.chain(add_orthogonality_penalty(10.0, GROUPS), adam()), STEPS)),
}
for name, (model, variables, _, coherences) in trained.items():
    print(f"{name}: {size_of(variables):,} parameters, test accuracy {accuracy(model, variables):.1f} %, "
          f"largest product of two elements {coherences[-1]:.2f}")

# %% [markdown]
# With the penalty the basis stays near orthonormal: the products of different elements stay near 0. Without it they do
# not. On this small task the accuracy hardly differs.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for name, (model, _, losses, coherences) in trained.items():
    left.semilogy(np.convolve(losses, np.ones(20) / 20, "valid"), label=name)
    if model.shared:
        right.plot(coherences, label=name, color=left.lines[-1].get_color())
left.set(xlabel="step", ylabel="training loss, mean of 20 steps")
right.set(xlabel="step", ylabel="largest product of two elements", ylim=(0, None))
left.legend()
right.legend()
plt.show()

# %% [markdown]
# ## 3. The basis
#
# A row for each element, a column for each channel; blue is negative, red positive.

# %%
basis = trained["shared, penalty"][1]["params"]["bases"]["body"]
figure = plt.figure(figsize=(9, 5), layout="constrained")
plt.imshow(plt.imread(io.BytesIO(draw_basis(basis))))
plt.axis("off")
plt.show()

# %% [markdown]
# ## 4. Compress the plain network
#
# `factorize_kernels` takes the kernels of the trained *plain* network and what comes into these layers on some training
# images, and returns a basis, and for each layer coefficients and unique elements: those that change the results of the
# layers least. No training is needed for that; a few steps of fine-tuning then make up for most of what is lost.

# %%
SAMPLE = train_images[:500]


def compress(variables, model):
    """Returns the variables of `model`, which has a basis, from those of the plain network."""
    _, seen = plain.apply(variables, SAMPLE, train=False, mutable=["inputs"])
    params, stats = dict(variables["params"]), dict(variables["batch_stats"])
    found = factorize_kernels([params[name]["kernel"] for name in LAYERS], model.shared, model.unique,
                              activations=[seen["inputs"][f"into_{name}"][0] for name in LAYERS], centered=True)
    params["bases"] = {"body": found.basis}
    for name, layer in zip(LAYERS, found.layers, strict=True):
        params[name], stats[name] = layer.variables()["params"], layer.variables()["batch_stats"]
        norm = stats[f"{name}_norm"]  # the batch normalisation that follows expects the results of the plain layer
        stats[f"{name}_norm"] = {"mean": norm["mean"] + layer.mean_shift, "var": norm["var"] * layer.var_ratio}
    return {"params": params, "batch_stats": stats}


points: dict[str, list[tuple[int, float]]] = {name: [] for name in ("compressed", "compressed and fine-tuned")}
for elements in (8, 16, 32):
    small = Net(shared=elements, unique=4)
    compressed = compress(trained["plain"][1], small)
    tuning = optax.chain(add_orthogonality_penalty(10.0, GROUPS), optax.adam(5e-4))
    tuned, *_ = train(small, compressed, tuning, STEPS // 5)
    for name, variables in zip(points, (compressed, tuned), strict=True):
        points[name].append((size_of(variables), accuracy(small, variables)))
        print(f"{elements} shared elements, {name}: {points[name][-1][0]:,} parameters, "
              f"test accuracy {points[name][-1][1]:.1f} %")

# %%
figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
for (name, found), marker in zip(points.items(), ("v", "o"), strict=True):
    axis.plot(*zip(*found, strict=True), marker=marker, label=name)
for name, marker in (("plain", "s"), ("shared, penalty", "D")):
    model, variables, *_ = trained[name]
    axis.plot(size_of(variables), accuracy(model, variables), marker, label=f"trained: {name}")
axis.set(xlabel="parameters", ylabel="test accuracy in %", xlim=(0, None))
axis.legend()
plt.show()

# %% [markdown]
# ## In your model
#
# 1. Make the basis a parameter of the network, hand it to its layers, and replace `nn.Conv` by `BasisConv`. Layers can
#    share a basis if their kernels agree in size and input channels.
# 2. Put `add_orthogonality_penalty` into your optax chain, before the optimizer.
# 3. Or train it as it is, and compress it.
#
# The layer is there for Flax NNX too, as `shared_basis.nnx.BasisConv`. More examples, among them a U-Net, are in
# `examples/`, and what sharing costs and gains in `docs/`.
