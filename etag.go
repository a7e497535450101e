package main

import (
	"fmt"
	"net/http"
	"strings"
)

// Versions of links (RFC 9110 sections 8.8.3 and 13.1): answers carry an ETag. A change that names
// it in If-Match is made only if nobody else has changed the link since, and a GET that names it in
// If-None-Match is told when there is nothing new.

// etag names a version of a link. Every change moves updated_at on by a second at least. Only the
// removal of a link's owner does not, so the owner is part of the name.
func (l link) etag() string {
	var owner int64
	if l.UserID != nil {
		owner = *l.UserID
	}
	return fmt.Sprintf(`"%d-%d-%d"`, l.ID, l.UpdatedAt.Unix(), owner)
}

// checkMatch returns errChanged if r has an If-Match that does not name the version of l. A link
// that changed between the client's read and its write stays as it is.
func checkMatch(r *http.Request, l link) error {
	named := r.Header.Values("If-Match")
	if len(named) > 0 && !namesTag(named, l.etag()) {
		return errChanged
	}
	return nil
}

// isKnown says whether the client has this version of l already, as its If-None-Match says. For
// reading, a weak name (W/"…") is as good as a strong one.
func isKnown(r *http.Request, l link) bool {
	named := r.Header.Values("If-None-Match")
	return namesTag(named, l.etag()) || namesTag(named, "W/"+l.etag())
}

// namesTag says whether a header's lists of ETags have tag in them, or *, which is any.
func namesTag(lists []string, tag string) bool {
	for _, list := range lists {
		for named := range strings.SplitSeq(list, ",") {
			named = strings.TrimSpace(named)
			if named == tag || named == "*" {
				return true
			}
		}
	}
	return false
}
