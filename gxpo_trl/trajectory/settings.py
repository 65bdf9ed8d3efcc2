"""Settings of `gxpo extrapolate`."""

import math
from dataclasses import dataclass, field


METHODS = ("next", "relex", "alpharl", "rl-extra", "linear")


@dataclass
class ExtrapolationArguments:
    r"""
    How far and how a run's checkpoints are extrapolated.

    Parameters:
        run (`str`):
            Output folder of the run.
        steps_ahead (`int`, *optional*):
            How many optimizer steps ahead; a multiple of the checkpoints' spacing. Unset for five checkpoints.
        alpha (`str`, *optional*, defaults to `"1.0"`):
            α, the factor of the predicted movement; several, separated by commas, write one result each. The paper
            uses 1.5.
        method (`str`, *optional*, defaults to `"next"`):
            `next`, the predictor; `relex`, a line through the coordinates of all of a matrix along the one direction
            that it moves in most; `alpharl`, a line in the rank-1 subspace; `rl-extra`, the last movement of all
            weights once more; `linear`, a least-squares line through all weights.
        merged (`bool`, *optional*, defaults to `False`):
            Writes a whole model instead of an adapter. For full fine-tuning this is always so.
        output_dir (`str`, *optional*):
            Where results go, a folder for each α. Unset for `extrapolated/<method>` in the run's folder.
        last_step (`int`, *optional*):
            Leaves out the checkpoints after it.
        base_model (`str`, *optional*):
            Folder of the weights that a run of full fine-tuning started from.
        hidden_size, epochs, learning_rate, seed:
            The predictor's.
        without_global, without_local (`bool`, *optional*, defaults to `False`):
            The paper's ablations: inputs that the predictor does not get.
        device (`str`, *optional*, defaults to `"cpu"`):
            The device for triplets and for training the predictor.
    """

    run: str | None = field(default=None, metadata={"help": "Output folder of the run."})
    steps_ahead: int | None = field(
        default=None, metadata={"help": "Optimizer steps ahead, a multiple of the spacing; unset for 5 checkpoints."}
    )
    alpha: str = field(
        default="1.0",
        metadata={"help": "Stretches the predicted movement; several, separated by commas, write a result each."},
    )
    method: str = field(default="next", metadata={"help": f"One of {', '.join(METHODS)}."})
    merged: bool = field(default=False, metadata={"help": "Writes a whole model instead of an adapter."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where results go; unset for `extrapolated/<method>` in the run's folder."}
    )
    last_step: int | None = field(default=None, metadata={"help": "Leaves out the checkpoints after it."})
    base_model: str | None = field(
        default=None, metadata={"help": "Folder of the weights that a run of full fine-tuning started from."}
    )
    hidden_size: int = field(default=128, metadata={"help": "The predictor's hidden size."})
    epochs: int = field(default=300, metadata={"help": "The predictor's epochs, at most."})
    learning_rate: float = field(default=1e-3, metadata={"help": "The predictor's learning rate."})
    seed: int = field(default=0, metadata={"help": "Of the predictor's initial weights."})
    without_global: bool = field(default=False, metadata={"help": "Does not show the predictor global deltas."})
    without_local: bool = field(default=False, metadata={"help": "Does not show the predictor local deltas."})
    device: str = field(default="cpu", metadata={"help": "Where to compute: 'cpu', 'cuda', …"})

    def __post_init__(self):
        if not self.run:
            raise ValueError("There is no run to extrapolate. Set `run`, or name its folder first.")
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {self.method!r}.")
        for name in ("steps_ahead", "last_step", "hidden_size", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"`learning_rate` must be a finite number above 0, got {self.learning_rate}.")
        if self.without_global and self.without_local:
            raise ValueError("`without_global` and `without_local` leave the predictor no input. Unset one.")
        if self.method != "next" and (self.without_global or self.without_local):
            raise ValueError("`without_global` and `without_local` only apply to `method: next`.")
        self.alphas()

    def alphas(self) -> list[float]:
        """The values of α.

        Raises:
            ValueError: If there is none, or one is not a finite number of at least 0.
        """
        values = self.alpha if isinstance(self.alpha, list) else str(self.alpha).split(",")
        try:
            alphas = [float(value) for value in values]
        except ValueError:
            alphas = []
        if not alphas or not all(0 <= alpha < math.inf for alpha in alphas):
            raise ValueError(f"`alpha` must be finite numbers of at least 0, separated by commas, got {self.alpha!r}.")
        return alphas
