"""What launcher and machine say about the ranks: variables, host lists, ports and interfaces, without torch."""
