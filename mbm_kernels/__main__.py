from mbm_kernels.cli import main

main()
