package main

import (
	"context"
	"net"
	"testing"
	"time"
)

// TestConnDead tells a connection that its peer has closed, or wrote to, from one that is idle.
func TestConnDead(t *testing.T) {
	tests := []struct {
		name string
		peer func(peer net.Conn)
		want bool
	}{
		{"idle", func(net.Conn) {}, false},
		{"closed", func(peer net.Conn) { peer.Close() }, true},
		{"reset", func(peer net.Conn) {
			peer.(*net.TCPConn).SetLinger(0)
			peer.Close()
		}, true},
		{"closed for writing", func(peer net.Conn) { peer.(*net.TCPConn).CloseWrite() }, true},
		{"unread bytes", func(peer net.Conn) { peer.Write([]byte("E")) }, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer listener.Close()
			c, err := net.Dial("tcp", listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			peer, err := listener.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer peer.Close()
			c.SetReadDeadline(time.Now().Add(-time.Second)) // a deadline of the last statement
			if connDead(c) {
				t.Fatal("dead before anything happened")
			}
			tt.peer(peer)
			if tt.want {
				eventually(t, patience, "it is seen", func() bool { return connDead(c) })
			} else if connDead(c) {
				t.Error("dead, and nothing happened")
			}
		})
	}
	one, other := net.Pipe()
	defer other.Close()
	defer one.Close()
	if connDead(one) {
		t.Error("what is no socket is taken as dead")
	}
}

// TestSharePort lets a second listener have the port of the first.
func TestSharePort(t *testing.T) {
	config := net.ListenConfig{Control: sharePort}
	first, err := config.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	second, err := config.Listen(context.Background(), "tcp", first.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	second.Close()
}
