// Package hostapi is the wire between center, host agents and vmx processes:
// protobuf messages, gRPC services and the form of errors, without logic.
//
// Place in the flow: center calls a host over mutual TLS, a host calls its vmx
// processes over unix sockets, and a joining host calls center once. It imports
// nothing of Mortise. hostapi.proto is the source; the Go code beside this file
// is generated from it.
package hostapi

//go:generate protoc --go_out=../.. --go_opt=module=mortise --go-grpc_out=../.. --go-grpc_opt=module=mortise -I ../.. internal/hostapi/hostapi.proto
