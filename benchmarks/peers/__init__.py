"""Other ways to compute the same meta-step, each as its users would write it."""

from benchmarks.implementation import Implementation
from benchmarks.peers.autograd_loop import AutogradLoop
from benchmarks.peers.jax_jit import JaxJit
from benchmarks.peers.parallel_metalearn import ParallelMetalearn
from benchmarks.peers.vmap_grad import CompiledVmapGrad, VmapGrad

PEERS: tuple[Implementation, ...] = (
    AutogradLoop(),
    VmapGrad(),
    CompiledVmapGrad(),
    JaxJit(),
    ParallelMetalearn(),
)
