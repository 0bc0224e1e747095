// Command mortise-pkcs11 lets the key server use a PKCS#11 token. The key server starts
// it; the two speak the protocol of mortise/internal/rootkey/pkcs11 on standard
// input and output, and the PIN comes that way too. It is a program of its own
// because a token's library is somebody else's C code, and needs cgo, which mortise
// does without.
package main
