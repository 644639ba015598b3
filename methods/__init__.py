"""The built-in methods: each file is one method, named as the file; `algorithms` holds what several of them share."""
