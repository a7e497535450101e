package main

import (
	"context"
	"errors"
	"net/http"
	"strings"
)

// Creates that may be sent again. A client that got no answer, or a 503, cannot know whether its
// link was made. With an Idempotency-Key of its own making it need not: however often it sends the
// same request with the same key, and to whichever replica, one link is made, and every answer is
// the same 201 with that link. Another request under the same key is refused.
//
// Nothing is stored for it. The link's code follows from the key, and the unique index on codes
// decides which of several requests makes the link. A key belongs to the token that it was sent
// with, and is good for ever.
//
// A create with a code of the client's choice may be sent again too, and there the code does what
// the key does elsewhere: requests for two codes make two links, also under one key. The code is
// then taken, and the link is told apart from somebody else's by all that it says: if it is exactly
// the one asked for, and nobody has changed it since, it is the answer.

const (
	keyHeader = "Idempotency-Key"
	maxKey    = 255 // bytes; a UUID has 36
)

// readKey takes the Idempotency-Key of a create, if it has one, and with it the code of the link.
func (s *Server) readKey(r *http.Request, f *fields, l *newLink) {
	sent := r.Header.Values(keyHeader)
	if len(sent) == 0 {
		return
	}
	key := strings.Trim(sent[0], " \t")
	strange := func(c rune) bool { return c < ' ' || c > '~' }
	if len(sent) > 1 || key == "" || len(key) > maxKey || strings.ContainsFunc(key, strange) {
		f.refuse(keyHeader, "must be one text of 1 to 255 printable ASCII characters, such as a UUID")
		return
	}
	l.keyed = true
	if l.code == "" {
		l.code = codeFromKey(s.tokenOf(r), key)
	}
}

// tokenOf is the token that a request was let in with; "" where none is needed.
func (s *Server) tokenOf(r *http.Request) string {
	if s.cfg.Open() {
		return ""
	}
	return requestToken(r)
}

// madeBefore returns the link that an earlier request made for l, whose code is taken. What the
// link says is compared only while nobody has changed it: afterwards the key alone must do.
func (s *Server) madeBefore(ctx context.Context, l newLink) (link, error) {
	found, err := s.store.linkOf(ctx, l.code)
	if errors.Is(err, errNotFound) {
		return link{}, errUnavailable // the request that was about to make it has failed
	}
	if err != nil {
		return link{}, err
	}
	isUnchanged := found.UpdatedAt.Equal(found.CreatedAt.Time)
	isSame := jsonText(l.made(found.ID, found.CreatedAt)) == jsonText(found)
	switch {
	case isUnchanged && isSame:
		return found, nil
	case l.custom:
		return link{}, errCodeTaken
	case isUnchanged:
		return link{}, errKeyReused
	}
	found, err = s.store.link(ctx, found.ID)
	if errors.Is(err, errNotFound) {
		return link{}, errKeyReused // it was deleted
	}
	return found, err
}
