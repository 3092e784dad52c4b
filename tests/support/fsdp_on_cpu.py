"""Lets accelerate shard models over CPU processes, which it does over accelerators alone.

Imported, it sets that up; as a script it runs the command line too, under `accelerate launch`.
"""

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

prepare = AcceleratorState.__init__


def prepare_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    """What accelerate does after `prepare` where the processes have GPUs."""
    prepare(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = prepare_with_fsdp

if __name__ == "__main__":
    from attnopt.cli import main

    main()
