package main

func avx512(decrypt bool) {}
