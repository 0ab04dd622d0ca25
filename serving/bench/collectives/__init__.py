"""What a fabric gives to the ranks of a tensor-parallel group."""
