// Floor is what hop is measured against: net/http doing nothing but redirect, with default GC and server settings.
// It does look the code up, in a map that never changes: a constant answer would be 20 ns cheaper, answer 302 to everything, and
// measure something that is no redirect any more.
//
//	floor PORT seeds/urls.csv
package main

import (
	"encoding/csv"
	"log"
	"net/http"
	"os"
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
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Args[1], nil))
}

func must[T any](v T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return v
}
