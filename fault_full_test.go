//go:build fault

package main

// `make fault` asks for the full length of each fault.
func init() {
	fullLength = true
}
