"""Tell the update where the training loop is."""

from transformers import TrainerCallback

from .update import LookaheadUpdate


class UpdateCallback(TrainerCallback):
    """What both have.

    Args:
        update (`LookaheadUpdate`): Of the trainer that has the callback.
    """

    def __init__(self, update: LookaheadUpdate):
        self.update = update


class StepTakenCallback(UpdateCallback):
    """The first of all callbacks: says that the step was taken, before others may save."""

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.update.step_taken()


class StepCallback(UpdateCallback):
    """After the user's callbacks, which may have changed the loss: says that a step begins, and that it has ended."""

    def on_step_begin(self, args, state, control, **kwargs):
        self.update.layout.position = 0
        self.update.layout.check_loss()

    def on_step_end(self, args, state, control, **kwargs):
        self.update.step_ended()
