"""The commands of `elsteer`: each parses, calls one function and shows what it gave. torch is imported only inside."""
