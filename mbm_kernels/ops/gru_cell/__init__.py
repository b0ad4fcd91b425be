from mbm_kernels.ops.gru_cell.op import gru_cell as gru_cell
