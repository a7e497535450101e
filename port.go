package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"
)

// The port, which hops of one database share, and others must not.
//
// A rolling restart on one machine starts the new hop on the port of the old one, and the kernel
// deals connections out to both. If they are of different services, each answers the other's users
// with links that are not theirs, and no error. So every hop shows which port it is on and, once it
// knows, whose database it serves: by a name that the others on this machine see (holdName). One
// that finds another before it on its port does not listen until both are known to serve the same
// database, and ends if they do not.
//
// What is not noticed: another program on the port, and a hop of an older release, for neither
// shows a name (they would have to run as the same user, and to ask for sharing too); and a
// database that was restored from a copy of the other, since both have one id.

// errPortTaken ends a hop that would answer another one's users.
var errPortTaken = errors.New("belongs to a hop with another database: the users of each would " +
	"get answers of the other (set PORT to another port, or DATABASE_URL to the same database)")

// errPortUnclear says that the hop before this one does not know its database yet.
var errPortUnclear = errors.New("the hop that is on PORT already does not know its database yet")

// lookAround is how often a hop that does not listen yet looks whether the one before it is gone.
const lookAround = 100 * time.Millisecond

// sharedPort is the port of this hop, and its place among those that share it. A nil one is that of
// a server that has its port from somebody else.
type sharedPort struct {
	number int
	place  string // sorts the hops of a port by their start
	log    *slog.Logger
	opened chan net.Listener // gets the listener, once
	failed chan error        // gets why this hop must end

	mu       sync.Mutex   // guards what follows
	name     io.Closer    // what others see of this hop
	listener net.Listener // nil until it listens
}

// portHop is what a hop shows of itself. Its database is "" until it is known.
type portHop struct{ place, database string }

// joinPort shows that this hop is on a port, and does not listen yet.
func joinPort(number int, log *slog.Logger) *sharedPort {
	p := &sharedPort{
		number: number,
		place:  fmt.Sprintf("%020d-%s", time.Now().UnixNano(), rand.Text()[:8]),
		log:    log,
		opened: make(chan net.Listener, 1),
		failed: make(chan error, 1),
	}
	p.show("")
	return p
}

// prefix is how the names of all hops on the port begin.
func (p *sharedPort) prefix() string { return fmt.Sprintf("hop/%d/", p.number) }

// show tells others which database this hop serves. Without a name they cannot know, which is no
// reason not to serve.
func (p *sharedPort) show(database string) {
	name, err := holdName(p.prefix() + p.place + "/" + database)
	if err != nil {
		p.log.Warn("other services on PORT will not notice this one", "err", err)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.name != nil {
		p.name.Close()
	}
	p.name = name
}

// neighbours are the other hops on the port. On port 0 there are none: the kernel picks a free one.
func (p *sharedPort) neighbours() []portHop {
	if p.number == 0 {
		return nil
	}
	names, err := heldNames(p.prefix())
	if err != nil {
		p.log.Warn("other services on PORT are not noticed", "err", err)
	}
	var others []portHop
	for _, name := range names {
		place, database, _ := strings.Cut(strings.TrimPrefix(name, p.prefix()), "/")
		if place != p.place {
			others = append(others, portHop{place, database})
		}
	}
	return others
}

// isFirst says whether no other hop is before this one.
func (p *sharedPort) isFirst() bool {
	for _, other := range p.neighbours() {
		if other.database != "" || other.place < p.place {
			return false
		}
	}
	return true
}

// claim is called when the database is known, and again until it succeeds. It listens, unless this
// hop does already, and fails as long as that could make it answer the users of another service.
func (p *sharedPort) claim(ctx context.Context, databaseID string) error {
	if p == nil {
		return nil
	}
	// The id is the name of keys and journals, which are nobody else's business.
	database := fmt.Sprintf("%x", sha256.Sum256([]byte(databaseID)))[:16]
	for _, other := range p.neighbours() {
		switch {
		case other.database == "" && other.place < p.place:
			return errPortUnclear
		case other.database != "" && other.database != database:
			return p.fail(fmt.Errorf("PORT %d %w", p.number, errPortTaken))
		}
	}
	p.show(database)
	return p.listen(ctx)
}

// fail has this hop end because of err, and returns it.
func (p *sharedPort) fail(err error) error {
	select {
	case p.failed <- err:
		p.log.Error("this hop ends", "err", err)
	default: // it ends already
	}
	return err
}

// listen opens the port, once.
func (p *sharedPort) listen(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.listener != nil {
		return nil
	}
	config := net.ListenConfig{Control: sharePort}
	listener, err := config.Listen(ctx, "tcp", fmt.Sprintf(":%d", p.number))
	if err != nil {
		return p.fail(fmt.Errorf("%w (set PORT to another port)", err))
	}
	p.listener = listener
	p.opened <- listener
	return nil
}

// wait returns the listener when there is one: at once, or when claim has succeeded, or when the
// hops before this one are gone.
func (p *sharedPort) wait(ctx context.Context) (net.Listener, error) {
	for {
		select {
		case listener := <-p.opened:
			return listener, nil
		case err := <-p.failed:
			return nil, err
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(lookAround):
			if p.isFirst() {
				p.listen(ctx) // an error comes out of failed
			}
		}
	}
}

// close leaves the port to others, after the server has stopped listening.
func (p *sharedPort) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.name != nil {
		p.name.Close()
	}
	if p.listener != nil {
		p.listener.Close() // an error means that it is closed
	}
}
