"""`dist-train report`: writes a page about one or several runs from their directories, without torch."""
