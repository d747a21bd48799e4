"""The command line `hf-guidance`: compare two networks, inspect them as target and guide, or list the layers of one.

`main` reads the words, `networks` loads what they name, `data` makes batches that both networks take, `comparing`,
`inspecting` and `listing` are the commands. Nothing here is imported by the other rooms.
"""
