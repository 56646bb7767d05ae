"""What a call and what a training step costs: clocks, peers, rooflines and profiles."""

from vqkernels.profiling.figures import bars as bars
from vqkernels.profiling.figures import roofline as roofline
from vqkernels.profiling.measuring import Benchmark as Benchmark
from vqkernels.profiling.measuring import Measurement as Measurement
from vqkernels.profiling.measuring import benchmark as benchmark
from vqkernels.profiling.ranges import quantizers_of as quantizers_of
from vqkernels.profiling.ranges import ranges as ranges
from vqkernels.profiling.step_profile import Comparison as Comparison
from vqkernels.profiling.step_profile import StepProfile as StepProfile
from vqkernels.profiling.table import format_table as format_table
from vqkernels.profiling.training_step import compare_convert as compare_convert
from vqkernels.profiling.training_step import profile as profile
