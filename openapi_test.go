package main

import "testing"

func checkStatuses(t *testing.T, seen seenStatuses) { t.Skip("later") }
