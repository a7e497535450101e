// Floor is what hop is measured against: net/http doing nothing but redirect, with default GC and
// server settings. It does look the code up, in a map that never changes: a constant answer would
// be 20 ns cheaper, answer 302 to everything, and measure something that is no redirect any more.
//
//	floor PORT seeds/urls.csv [timeouts]
//
// With timeouts it ends slow clients as hop does: what that costs is no cost of hop's own code.
package main

import (
	"encoding/csv"
	"log"
	"net/http"
	"os"
	"time"
)

func main() {
	locations := map[string][]string{}
	for _, row := range must(csv.NewReader(must(os.Open(os.Args[2]))).ReadAll()) {
		locations[row[2]] = []string{row[3]} // short_code, original_url
	}
	http.HandleFunc("GET /{code}", func(w http.ResponseWriter, r *http.Request) {
		location := locations[r.PathValue("code")]
		if location == nil {
			http.NotFound(w, r)
			return
		}
		w.Header()["Location"] = location
		w.WriteHeader(http.StatusFound)
	})
	server := &http.Server{Addr: "127.0.0.1:" + os.Args[1]}
	if len(os.Args) > 3 {
		server.ReadHeaderTimeout = 5 * time.Second
		server.ReadTimeout = 5 * time.Second
		server.WriteTimeout = 15 * time.Second
		server.IdleTimeout = 60 * time.Second
	}
	log.Fatal(server.ListenAndServe())
}

func must[T any](v T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return v
}
