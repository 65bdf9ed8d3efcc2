"""Tell the update where the training loop is."""

from transformers import TrainerCallback

from .update import LookaheadUpdate


class StepTakenCallback(TrainerCallback):
    """Tells the update that the step was taken, before other callbacks may save.

    Args:
        update (`LookaheadUpdate`): Of the trainer that has the callback.
    """

    def __init__(self, update: LookaheadUpdate):
        self.update = update

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.update.step_taken()


class StepCallback(TrainerCallback):
    """Tells the update and the layout where the training loop is, after other callbacks may have changed the loss.

    Args:
        update (`LookaheadUpdate`): Of the trainer that has the callback.
    """

    def __init__(self, update: LookaheadUpdate):
        self.update = update

    def on_step_begin(self, args, state, control, **kwargs):
        self.update.layout.position = 0
        self.update.layout.check_loss()

    def on_step_end(self, args, state, control, **kwargs):
        self.update.step_ended()
