//go:build fault

package main

func init() { fullLength = true }
