package main

func avx2(decrypt bool) {}
